"""An LLM engine without a control plane: requests in, tokens out; it knows nothing of gRPC, etcd or Redis."""
