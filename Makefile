# Each target is a thin call of a script in scripts/, which installs what it needs (Debian 12 and 13, Ubuntu 24.04), says
# what it does, refuses in one line where it cannot work, and can be run again.
.DEFAULT_GOAL := help
.PHONY: help demo test lint bench kernels image e2e clean

help: ## show this
	@sed -n 's/^\([a-z0-9]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: ## profile a sample program on this machine and show its flame graph in a browser (root)
	@scripts/demo

test: ## all that must pass for a change to land, on the real kernel too (root)
	@scripts/test

lint: ## formats, lints, licences, scripts, the page's build
	@scripts/lint

e2e: ## on a real Kubernetes: the chart installed, workloads, labels, rules, upgrade, uninstall
	@scripts/e2e

kernels: ## the agent on kernels 5.10, 6.1, 6.12 and 7.2 (KERNELS="6.1 7.2" for some)
	@scripts/kernels

image: ## container images of agent and collector (needs no Docker)
	@scripts/image

bench: ## what the agent costs, next to perf, in the same minute (root)
	@scripts/bench

clean: ## remove all that was built
	rm -rf target
