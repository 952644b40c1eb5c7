# The version of every program that is not ours, in this place only. The
# servers that tests run come from test/go.mod; make check compares.
NATS_SERVER_VERSION   := v2.15.2
NATSCLI_VERSION       := v0.5.1
GOLANGCI_LINT_VERSION := v2.15.0
GOFUMPT_VERSION       := v0.12.0
NFPM_VERSION          := v2.44.2
