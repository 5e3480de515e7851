# Each target calls a script in scripts/. A script installs its packages (Debian 12 and 13, Ubuntu 24.04), prints its steps,
# exits with one line where it cannot work, and can be run again.
.DEFAULT_GOAL := help
.PHONY: help demo test lint fuzz mutants kills bench kernels languages clients spark tools image e2e clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: ## profile a sample program on this machine and show its flame graph in a browser (root)
	@scripts/demo

test: ## run all tests that a change must pass, on the real kernel too (root)
	@scripts/test

fuzz: ## run all readers of foreign bytes on bytes that a fuzzer makes, 20 s each (scripts/fuzz --seconds N TARGET...)
	@scripts/fuzz

mutants: ## change modules of the ledger in one place at a time, and ask whether a test fails (hours)
	@scripts/mutants

kills: ## kill collectors 1,000 times on a directory and on a real S3 server that fails (scripts/kills KILLS SEED; half an hour)
	@scripts/kills

lint: ## check formats, lints, structure, language, licences, dependencies, scripts, chart, generated files
	@scripts/lint

e2e: ## test on a real Kubernetes: install, workloads, labels, rules, upgrade, uninstall
	@scripts/e2e

kernels: ## test the agent on kernels 5.10, 6.1, 6.12 and 7.2 (KERNELS="6.1 7.2" for some)
	@scripts/kernels

image: ## build the container images of agent and collector (needs no Docker)
	@scripts/image

languages: ## test the stacks of Python 3.11, 3.13 (also without the global lock, and with musl), 3.14 and 3.15, PHP 8.2 and 8.4, Ruby 3.1, 3.3 and 3.4, Java 11, 21 and 25, Node 18, 20, 22, 24 and 26, Go 1.27, .NET Core 3.1 (LANGUAGES="trixie" for some; root, Debian)
	@scripts/languages

spark: ## test that Spark reads the tables of the collector (PyPI, 900 MB)
	@scripts/table spark

clients: ## test the collector with Pyroscope's clients for Python and Node, and with a client like Grafana's (PyPI, npm)
	@scripts/clients

tools: ## test Gannet with tools of other projects: go build -pgo, a client of MCP (PyPI; root)
	@scripts/tools

bench: ## measure the cost of the agent next to perf (root)
	@scripts/bench

clean: ## remove all build results
	rm -rf target
