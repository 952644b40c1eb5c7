package main

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"time"

	"github.com/urfave/cli/v2"
)

// settings are the global flags, resolved: flag before environment before
// default.
type settings struct {
	json, quiet, yes, noInput, direct bool

	color    string        // auto, always, never
	timeout  time.Duration // 0: each command's own
	natsURL  string        // comma list
	apiURL   string        // comma list
	ca       string        // file; empty: the system's roots
	identity string        // file with one seed line SU...
	opsSeed  string        // file with the seed of the ops nkey, for direct

	origins []origin
}

// origin says where the value of one setting came from.
type origin struct {
	Name  string `json:"name"`
	Value string `json:"value"`
	From  string `json:"from"` // "flag --x", "env X" or "default"
}

// global describes one global flag; it is the only place that knows its
// spelling, its environment and its default. Files that hold secrets are named
// by path: no setting holds a secret itself.
type global struct {
	name, alias string
	env         []string
	value       string
	usage       string
	set         func(s *settings, value string) error // nil for switches
	on          func(s *settings) *bool               // nil for values
}

func globals() []global {
	return []global{
		{name: "json", alias: "j", usage: "print data as JSON", on: func(s *settings) *bool { return &s.json }},
		{name: "quiet", usage: "say nothing on stderr but errors", on: func(s *settings) *bool { return &s.quiet }},
		{name: "yes", alias: "y", usage: "do not ask for confirmation", on: func(s *settings) *bool { return &s.yes }},
		{name: "no-input", usage: "never ask anything: refuse instead", on: func(s *settings) *bool { return &s.noInput }},
		{name: "direct", usage: "work on the live KV with the ops seed, not over the API", on: func(s *settings) *bool { return &s.direct }},
		{
			name: "color", value: "auto", usage: "`auto|always|never`; NO_COLOR means never",
			set: func(s *settings, v string) error {
				s.color = v
				return oneOf(v, "auto", "always", "never")
			},
		},
		{
			name: "timeout", env: []string{"UNIBUS_TIMEOUT", "NATS_TIMEOUT"}, usage: "give up after `DURATION` (5s, 1m); default: each command's own",
			set: setTimeout,
		},
		{
			name: "nats-url", env: []string{"UNIBUS_NATS_URL", "NATS_URL"}, value: "tls://127.0.0.1:4250", usage: "NATS servers, a comma list of `URLS`",
			set: func(s *settings, v string) error { s.natsURL = v; return nil },
		},
		{
			name: "api-url", env: []string{"UNIBUS_API_URL"}, value: "https://127.0.0.1:8470", usage: "membership APIs, a comma list of `URLS`",
			set: func(s *settings, v string) error { s.apiURL = v; return nil },
		},
		{
			name: "ca", env: []string{"UNIBUS_CA", "NATS_CA"}, usage: "`FILE` with the CA that signs the servers' certificates",
			set: func(s *settings, v string) error { s.ca = v; return nil },
		},
		{
			name: "identity", env: []string{"UNIBUS_IDENTITY"}, usage: "`FILE` with your own seed (unibusctl identity new)",
			set: func(s *settings, v string) error { s.identity = v; return nil },
		},
		{
			name: "ops-seed", env: []string{"UNIBUS_OPS_SEED"}, usage: "`FILE` with the seed of the ops nkey, for --direct",
			set: func(s *settings, v string) error { s.opsSeed = v; return nil },
		},
		{
			name: "kv-replicas", value: "3", usage: "`3`, the only number that survives the loss of a node",
			set: func(_ *settings, v string) error {
				if v != "3" {
					return fmt.Errorf("%q is refused: unibus keeps three replicas of everything", v)
				}
				return nil
			},
		},
	}
}

// withoutUserinfo hides what NATS URLs may carry in front of the host: a
// password, or a token alone. Origins are printed; the setting itself keeps it.
func withoutUserinfo(urls string) string { return userinfo.ReplaceAllString(urls, "//xxxxx@") }

var userinfo = regexp.MustCompile(`//[^/,]*@`)

func oneOf(v string, choices ...string) error {
	for _, c := range choices {
		if v == c {
			return nil
		}
	}
	return fmt.Errorf("%q is not one of %v", v, choices)
}

func setTimeout(s *settings, v string) (err error) {
	if v == "" {
		return nil
	}
	if s.timeout, err = time.ParseDuration(v); err != nil || s.timeout <= 0 {
		return fmt.Errorf("%q is not a positive duration such as 5s or 1m", v)
	}
	return nil
}

func globalFlags() []cli.Flag {
	var flags []cli.Flag
	for _, g := range globals() {
		var aliases []string
		if g.alias != "" {
			aliases = []string{g.alias}
		}
		usage := g.usage
		for i, e := range g.env {
			usage += [2]string{" ($", ", $"}[min(i, 1)] + e
		}
		if len(g.env) > 0 {
			usage += ")"
		}
		if g.on != nil {
			flags = append(flags, &cli.BoolFlag{Name: g.name, Aliases: aliases, Usage: usage})
		} else {
			flags = append(flags, &cli.StringFlag{Name: g.name, Aliases: aliases, Usage: usage, Value: g.value})
		}
	}
	return flags
}

// resolveSettings takes each setting from its flag, else from the first of its
// variables that is not empty, else from its default, and refuses a bad value
// by naming where it came from.
func resolveSettings(c *cli.Context, getenv func(string) string) (settings, error) {
	var s settings
	for _, g := range globals() {
		o := origin{Name: g.name, Value: g.value, From: "default"}
		if g.on != nil {
			o.Value = strconv.FormatBool(c.Bool(g.name))
			*g.on(&s) = c.Bool(g.name)
		}
		if c.IsSet(g.name) {
			o.From = "flag --" + g.name
			if g.set != nil {
				o.Value = c.String(g.name)
			}
		} else {
			for _, e := range g.env {
				if v := getenv(e); v != "" {
					o.Value, o.From = v, "env "+e
					break
				}
			}
		}
		if g.set != nil {
			if err := g.set(&s, o.Value); err != nil {
				return settings{}, usagef("%s: %v", o.From, err)
			}
		}
		o.Value = withoutUserinfo(o.Value)
		s.origins = append(s.origins, o)
	}
	return s, nil
}

// within bounds a command by --timeout, or by its own limit when none is set.
func (a *app) within(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	if a.set.timeout > 0 {
		limit = a.set.timeout
	}
	return context.WithTimeout(ctx, limit)
}
