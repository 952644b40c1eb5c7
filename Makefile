# Targets for people. Versions of everything that is not ours: tools.mk.
include tools.mk

SHELL         := bash
.SHELLFLAGS   := -euo pipefail -c
.DEFAULT_GOAL := help

MODULES := bus cli/unibusctl services/authcallout services/membership test
UNITS   := $(filter-out test,$(MODULES))
BIN     := $(CURDIR)/bin
TOOLS   := $(BIN)/tools
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unversioned)

# Every module stands on its own go.mod; go.work is for editors.
export GOWORK := off

GO_BUILD := CGO_ENABLED=0 go build -trimpath -ldflags "-X main.version=$(VERSION)"
# Tests neither need nor see a local cluster or an operator's settings.
CLEAN_ENV = env $$(env | sed -n 's/^\(UNIBUS_[A-Z0-9_]*\)=.*/-u \1/p')
IN_TEST   = cd test && $(CLEAN_ENV) UNIBUS_FULL=1 go test -count=1 -p 1
# $(call pinned,BINARY,MODULE,VERSION): true if it is there at that version.
pinned  = go version -m $(1) 2>/dev/null | grep -qE '^[[:space:]]+mod[[:space:]]+$(2)[[:space:]]+$(3)[[:space:]]'
# $(call install,DIR,BINARY,PACKAGE,MODULE,VERSION)
install = @$(call pinned,$(1)/$(2),$(4),$(5)) || { echo "install $(2) $(5)"; GOBIN=$(1) CGO_ENABLED=0 go install $(3)@$(5); }

.PHONY: help
help: ## Show this list
	@sed -nE 's/^([a-z]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-9s %s\n", $$1, $$2 }'

.PHONY: build ours
build: ours ## Build our programs, the pinned nats-server and nats into bin/
	$(call install,$(BIN),nats-server,github.com/nats-io/nats-server/v2,github.com/nats-io/nats-server/v2,$(NATS_SERVER_VERSION))
	$(call install,$(BIN),nats,github.com/nats-io/natscli/nats,github.com/nats-io/natscli,$(NATSCLI_VERSION))

ours:
	@mkdir -p $(BIN)
	cd cli/unibusctl && $(GO_BUILD) -o $(BIN)/unibusctl .
	cd services/membership && $(GO_BUILD) -o $(BIN)/unibus-membership .
	cd services/authcallout && $(GO_BUILD) -o $(BIN)/unibus-authcallout .
	cd test && $(GO_BUILD) -o $(BIN)/ ./cmd/unibus-local ./cmd/unibus-load

.PHONY: up down status demo
up: build ## Start the local three-node cluster in .run/ (does nothing if it runs)
	@$(BIN)/unibus-local up

down: ## Stop the local cluster; its data stays in .run/
	@[[ ! -x $(BIN)/unibus-local ]] || $(BIN)/unibus-local down

status: ## Show the processes of the local cluster; fails unless all are healthy
	@[[ -x $(BIN)/unibus-local ]] || { echo "nothing is built: make up" >&2; exit 3; }
	@$(BIN)/unibus-local status

demo: up ## Walk through the system on the local cluster
	@test/demo.sh

.PHONY: test chaos controls bench fuzz
test: tools ## Unit tests of every module, then the tests on real clusters
	@for m in $(UNITS); do (cd $$m && $(CLEAN_ENV) go test -race ./...) || exit; done
	cd test && $(CLEAN_ENV) go test -race -count=1 -p 1 -parallel 3 -timeout 40m ./...

chaos: ## Long tests with killed and paused processes, at full numbers
	$(IN_TEST) -race -v -parallel 1 -timeout 90m -run 'Currency|NoClientIsLost|Quorum|TestStart$$|Linearizable|EnforceMany|Threats|Interrupted|Proof|Connections|SDK|ClusterReload|DoctorServers|EnforceFaults|EnforceRaceMany|Partition|Storm|Durable$$|CalloutKeyRotation|Gate$$|Blobs|Backup' .

controls: ## Prove that the tests notice: take one protection away at a time
	$(IN_TEST) -v -timeout 60m -run 'TestControls' .

bench: ## Measure a real cluster beside one of static users: the table of docs/performance.md
	$(IN_TEST) -timeout 60m -run '^$$' -bench . -benchtime 1x .

.PHONY: package
package: build ## A .deb and a .rpm for a node in bin/package/
	$(call install,$(TOOLS),nfpm,github.com/goreleaser/nfpm/v2/cmd/nfpm,github.com/goreleaser/nfpm/v2,$(NFPM_VERSION))
	@deploy/package/build.sh $(BIN) $(BIN)/package $(VERSION)

.PHONY: monitoring tools
monitoring: tools ## Each fault of deploy/monitoring on a live cluster, and the alert that a real Prometheus raises
	$(IN_TEST) -race -v -timeout 30m -run 'TestAlerts|TestMonitoring' .

tools: ## Unpack Debian's prometheus and haproxy into bin/tools/, for tests
	@test/tools.sh $(TOOLS)

.PHONY: fleet
fleet: package ## Three booted Debian systems, reached by ssh, from the inventory to the loss of all disks (root)
	@FLEET_FULL=1 test/fleet/fleet.sh

FUZZTIME ?= 20s
fuzz: ## Fuzz every fuzz target for FUZZTIME, then a cluster by its own OpenAPI document
	@for m in $(MODULES); do (cd $$m && for p in $$(go list ./...); do \
		for f in $$(go test -list '^Fuzz' $$p | grep '^Fuzz' || true); do \
			go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$p; done; done) || exit; done
	$(IN_TEST) -race -v -timeout 30m -run 'SchemaFuzz' .

.PHONY: check check-tools check-format check-lint check-modules check-config check-shell check-units check-monitoring check-package check-binaries check-tree
check: check-tree check-format check-lint check-modules check-shell check-units check-monitoring check-package check-binaries check-config ## Everything that must be clean before a commit, except the tests
	@echo "check: all clean"

check-tools:
	$(call install,$(TOOLS),gofumpt,mvdan.cc/gofumpt,mvdan.cc/gofumpt,$(GOFUMPT_VERSION))
	$(call install,$(TOOLS),golangci-lint,github.com/golangci/golangci-lint/v2/cmd/golangci-lint,github.com/golangci/golangci-lint/v2,$(GOLANGCI_LINT_VERSION))

check-format: check-tools
	@bad=$$($(TOOLS)/gofumpt -l $(MODULES)); [[ -z $$bad ]] || { echo "not formatted (bin/tools/gofumpt -w .):"; echo "$$bad"; exit 1; }

check-lint: check-tools
	@bad=; for m in $(MODULES); do echo "lint $$m"; (cd $$m && go vet ./... && go vet -tags controls ./... && \
		$(TOOLS)/golangci-lint run --config $(CURDIR)/.golangci.yml ./...) || bad+=" $$m"; done; [[ -z $$bad ]] || { echo "not clean:$$bad"; exit 1; }

check-modules:
	@for m in $(MODULES); do echo "build $$m"; (cd $$m && go build ./... && go mod tidy -diff) || exit; done
	@grep -q 'nats-io/nats-server/v2 $(NATS_SERVER_VERSION)' test/go.mod || { echo "test/go.mod: nats-server is not at $(NATS_SERVER_VERSION) (tools.mk)"; exit 1; }
	@tmp=$$(mktemp -d); trap 'rm -rf $$tmp' EXIT; \
		git ls-files -z '*go.mod' '*go.sum' go.work '*.go' | xargs -0 cp --parents -t $$tmp; cd $$tmp; \
		GOWORK=$$tmp/go.work go work sync; \
		for m in $(MODULES); do diff -u $(CURDIR)/$$m/go.mod $$m/go.mod || { echo "versions differ between modules: GOWORK= go work sync"; exit 1; }; done

check-config: build
	@tmp=$$(mktemp -d); trap 'rm -rf $$tmp' EXIT; UNIBUS_RUN_DIR=$$tmp $(BIN)/unibus-local render; \
		for n in n1 n2 n3; do $(BIN)/nats-server -t -c $$tmp/$$n/etc/nats/nats-server.conf; \
			$(BIN)/unibusctl config check --dir $$tmp/$$n/etc --nats-server $(BIN)/nats-server; done

check-shell:
	@git grep -lzIE '^#!.*\b(ba)?sh$$' | xargs -0 -r shellcheck

check-units:
	@command -v systemd-analyze >/dev/null || [[ $$(id -u) != 0 ]] || ! command -v apt-get >/dev/null || \
		apt-get install -q -y --no-install-recommends systemd >/dev/null || true
	@deploy/systemd/check.sh

check-monitoring: tools
	@deploy/monitoring/check.sh $(TOOLS)

check-package: package
	@deploy/package/check.sh $(BIN)/package

# A released binary must hold no switch that takes a protection away.
check-binaries: build
	@! grep -l UNIBUS_GUARD_OFF $(BIN)/unibus* || { echo "built with the tag controls"; exit 1; }

check-tree:
	@! git grep -nIE '(^|[^[:alnum:]_.<>-])/(work|root|home/[a-z]+|Users)/' -- ':!Makefile' || { echo "paths of a machine in the tree"; exit 1; }

.PHONY: clean
clean: down ## Stop the local cluster and remove it with everything built
	rm -rf $(BIN) .run
