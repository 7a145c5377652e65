# Volary. Every target does its own set-up: libtorch is found, or put into .venv (scripts/setup-libtorch).
SHELL := /bin/bash
CARGO ?= cargo
CONFIG ?= examples/quickstart.toml
NODES ?= 3
TARGET ?= frame
FUZZ_SECONDS ?= 60

.PHONY: train test test-gpu soak build lint audit fuzz bench bundle setup setup-tools clean help

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## Find or install libtorch, and tell cargo where it is
	@scripts/setup-libtorch

setup-tools: ## A browser and a collector of traces for two of the tests, where they can be installed
	@scripts/setup-tools

build: setup ## The release binary, target/release/volary
	$(CARGO) build --release --bin volary

train: build ## Train the quickstart on this machine: a supervisor and 3 node processes
	target/release/volary train $(CONFIG) --nodes $(NODES)

test: build ## The whole test suite
	$(CARGO) test --release --workspace

soak: build ## Long: 20,000 schedules of faults in simulated time, and 20 random scripts on real processes
	VOLARY_SOAK=20000 $(CARGO) test --release -p volary-sim soak
	VOLARY_CHAOS=20 $(CARGO) test --release -p volary-cli --test trouble random_trouble -- --nocapture

test-gpu: build ## The numeric suite on the first GPU; skipped with a message where there is none
	@if target/release/volary doctor --has-cuda; then \
	  VOLARY_TEST_DEVICE=cuda:0 $(CARGO) test --release -p volary-model; \
	else echo "skipped: this machine has no CUDA device that libtorch can use"; fi

lint: setup ## Format, lints, and the direction of dependencies
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	scripts/check-dependencies
	scripts/check-licences licenses bans sources

audit: ## Known vulnerabilities of dependencies; needs the network for the advisories
	scripts/check-licences advisories

fuzz: setup ## A decoder under libFuzzer: make fuzz TARGET=frame FUZZ_SECONDS=60 (needs cargo-fuzz)
	@scripts/fuzz $(TARGET) $(FUZZ_SECONDS)

bench: build ## Throughput and transport figures
	$(CARGO) bench -p volary-transport
	$(CARGO) bench -p volary-cli

bundle: build ## A stripped binary and the examples, for machines that have PyTorch 2.11 and no Rust: dist/volary.tar.gz
	scripts/bundle

clean: ## Remove what was built; .venv and runs stay
	$(CARGO) clean
