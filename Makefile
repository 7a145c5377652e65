# Volary. Every target that needs libtorch finds it or installs it into .venv (scripts/setup-libtorch).
SHELL := /bin/bash
CARGO ?= cargo
CONFIG ?= examples/quickstart.toml
NODES ?= 3
TARGET ?= frame
FUZZ_SECONDS ?= 60
ROUNDS ?= 10
PART ?= 0/40

.PHONY: train test test-fast test-gpu soak flakes build lint audit fuzz mutants bench bundle setup setup-tools clean help

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## Find or install libtorch, and configure cargo for it
	@scripts/setup-libtorch

setup-tools: ## Install Chromium, Helm, a trace collector and cargo-deny for some tests and lints, where possible
	@scripts/setup-tools

build: setup ## Build the release binary, target/release/volary
	$(CARGO) build --release --bin volary

train: build ## Train the quickstart on this machine: a supervisor and 3 node processes
	target/release/volary train $(CONFIG) --nodes $(NODES)

test: build ## Run all tests
	$(CARGO) test --release --workspace

# Every crate that needs no libtorch: whole clusters of real actors run here in one process.
FAST = core sim data transport storage telemetry protocol node supervisor
test-fast: ## Run all tests that need no libtorch: seconds, once built
	$(CARGO) test --release $(FAST:%=-p volary-%)

soak: build ## Long: 20,000 fault schedules in simulated time, and 20 random scripts on real processes
	VOLARY_SOAK=20000 $(CARGO) test --release -p volary-sim soak
	VOLARY_CHAOS=20 $(CARGO) test --release -p volary-cli --test trouble random_trouble -- --nocapture

flakes: build ## Long: run all tests ROUNDS times beside two busy loops, and name those that failed
	@scripts/flakes $(ROUNDS)

test-gpu: build ## Run the numeric tests on the first GPU; skipped with a message without one
	@if target/release/volary doctor --has-cuda; then \
	  CUBLAS_WORKSPACE_CONFIG=:4096:8 VOLARY_TEST_DEVICE=cuda:0 $(CARGO) test --release -p volary-model; \
	else echo "skipped: this machine has no CUDA device that libtorch can use"; fi

lint: setup ## Check formatting, lints, the direction of dependencies, licenses
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	scripts/check-dependencies
	scripts/check-style
	scripts/check-licences licenses bans sources

audit: ## Check dependencies for known vulnerabilities; needs the network
	scripts/check-licences advisories

fuzz: setup ## Fuzz one decoder: make fuzz TARGET=frame FUZZ_SECONDS=60 (needs cargo-fuzz)
	@scripts/fuzz $(TARGET) $(FUZZ_SECONDS)

mutants: ## Mutate a part of the core and the actors, and list the mutants that no test finds: make mutants PART=0/40
	@command -v cargo-mutants > /dev/null || { echo "cargo-mutants is missing: cargo install --locked cargo-mutants"; exit 1; }
	@mkdir -p dist
	$(CARGO) mutants --shard $(PART) --sharding round-robin --output dist

bench: build ## Measure throughput and transport
	$(CARGO) bench -p volary-transport
	$(CARGO) bench -p volary-data
	$(CARGO) bench -p volary-cli

bundle: build ## Pack a stripped binary and the examples for machines with PyTorch 2.11 and without Rust: dist/volary.tar.gz
	scripts/bundle

clean: ## Remove build outputs; .venv and runs stay
	$(CARGO) clean
