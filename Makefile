# Twostroke. `make run` and `make test` work from a bare clone with Python 3.11 to 3.13; PYTHON=... names another one.
.DEFAULT_GOAL := help
BIN := .venv/bin
PACKAGES := proto kernels engine services/chassis services/worker services/router services/prefill services/decode cli
CODE := $(PACKAGES) deploy examples benchmarks docs hatch_build.py
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest
# Two processes for what computes, then two for what waits, then one for whole clusters; pytest's 5: a part has no test.
PARTS = "-n 2 -m \"not servers and not alone $(1)\"" "-n 2 --dist loadfile -m \"servers $(1)\"" "-m \"alone $(1)\""
tests = chosen=5; for part in $(PARTS); do status=0; eval $(PYTEST) $$part '$(2)' || status=$$?; \
	case $$status in 0) chosen=0;; 5) ;; *) exit $$status;; esac; done; exit $$chosen
export PYTHON
.PHONY: help setup run demo test quick lint format types arch check proto docs images clean

setup: ; @sh deploy/setup.sh                                       ## build .venv: packages, torch, protos (nothing to do: nothing done)
run: setup ; @$(BIN)/twostroke up $(ARGS)                          ## start a cluster on this machine; ARGS="--prefill 2 --decode 2" adds flags
demo: setup ; @$(BIN)/twostroke demo $(ARGS)                       ## start a cluster, ask it one question, stop it
test: setup ; @$(call tests,,$(ARGS))                              ## every test
quick: setup ; @$(call tests,and not slow and not e2e,$(ARGS))     ## the tests that take under two minutes together
lint: setup ; @$(BIN)/ruff check . && $(BIN)/ruff format --check . ## style
format: setup ; @$(BIN)/ruff check --fix . ; $(BIN)/ruff format .  ## mend style
types: setup ; @$(BIN)/mypy $(CODE)                                ## mypy, strict
arch: setup ; @$(BIN)/lint-imports                                 ## who may import whom
check: lint types arch test                                        ## all of the above: what CI runs
proto: setup ; @$(BIN)/python hatch_build.py                       ## generate Python from proto/
docs: setup ; @$(BIN)/python docs/generate.py                      ## write docs/reference/ and the list of ADRs from the code
images: ; @sh deploy/images.sh                                     ## build the container images; REGISTRY, TAG, TARGETS, PUSH=1
clean: ; @rm -rf .venv .*_cache .hypothesis .run dist build proto/twostroke_proto/v1/*_pb2*  ## remove what setup, builds and tests made
help: ; @sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "make %-8s %s\n", $$1, $$2 }'  ## this list
