package client

import (
	"os"
	"runtime"
	"strings"

	"unibus.internal/bus"
	"unibus.internal/bus/sig"
)

// Environment is a DialConfig for the user and the bus that the environment
// names, by the variables that unibusctl knows and that make up writes to
// .run/env. Give it os.Getenv.
//
//	UNIBUS_IDENTITY  file with the user's seed, one line SU..., that only its owner may read
//	UNIBUS_CA        file with the CA of the servers, read again at each connect
//	UNIBUS_NATS_URL  tls://host:port of each server, separated by commas
//	UNIBUS_API_URL   https://host:port of each node, separated by commas
//
// Invalid says which of them is not set, or not good. Keys are left to who wants
// encrypted rooms: see KeysConfig.
func Environment(getenv func(string) string) (DialConfig, error) {
	for _, name := range []string{"UNIBUS_IDENTITY", "UNIBUS_CA", "UNIBUS_NATS_URL", "UNIBUS_API_URL"} {
		if getenv(name) == "" {
			return DialConfig{}, bus.E(bus.Invalid, "%s is not set", name).WithHint("unibusctl env")
		}
	}
	file := getenv("UNIBUS_IDENTITY")
	info, err := os.Stat(file)
	if err != nil {
		return DialConfig{}, bus.E(bus.Invalid, "UNIBUS_IDENTITY: %w", err).WithHint("unibusctl identity new --out FILE")
	}
	if err := bus.OnlyOwnerReads(file, info.Mode()); err != nil && runtime.GOOS != "windows" { // which has no such modes
		return DialConfig{}, bus.E(bus.Invalid, "UNIBUS_IDENTITY: %w", err).WithHint("chmod 600 %s", file)
	}
	seed, err := os.ReadFile(file)
	if err != nil {
		return DialConfig{}, bus.E(bus.Invalid, "UNIBUS_IDENTITY: %w", err).WithHint("unibusctl identity show FILE")
	}
	id, err := sig.ParseIdentity(seed)
	if err != nil {
		return DialConfig{}, bus.E(bus.Invalid, "UNIBUS_IDENTITY: %w", err).WithHint("unibusctl identity show FILE")
	}
	api, err := New(Config{URLs: strings.Split(getenv("UNIBUS_API_URL"), ","), CAFile: getenv("UNIBUS_CA"), Identity: id})
	if err != nil {
		return DialConfig{}, err
	}
	var urls []string
	for url := range strings.SplitSeq(getenv("UNIBUS_NATS_URL"), ",") {
		urls = append(urls, strings.TrimSpace(url))
	}
	return DialConfig{URLs: urls, CAFile: getenv("UNIBUS_CA"), Identity: id, API: api}, nil
}
