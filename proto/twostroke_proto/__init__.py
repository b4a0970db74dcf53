"""Protobuf contracts of Twostroke; the Python beside each .proto is generated, never committed."""
