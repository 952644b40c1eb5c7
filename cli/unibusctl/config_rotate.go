package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/nats-io/nkeys"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
)

// rotatable is a secret that the nodes can have two of, so that it is replaced
// while they run.
type rotatable struct {
	name string
	file string // in the secrets directory; NAME-next and NAME-old stand beside it
	make func(path string, a *app) error
	act  string // what brings a stage into effect
}

func rotatables() []rotatable {
	key := func(prefix nkeys.PrefixByte) func(string, *app) error {
		return func(path string, a *app) error {
			_, err := makeKey(path, prefix, a.rand, true)
			return err
		}
	}
	const restart, reload = "unibusctl cluster rollout upgrade", "unibusctl cluster rollout reload"
	out := []rotatable{{"route-password", routePasswordFile, func(path string, a *app) error { return makePassword(path, a.rand, true) }, reload}}
	for _, k := range keyFiles {
		out = append(out, rotatable{k.name, k.file(), key(k.prefix), restart})
	}
	return out
}

func rotatableNames() []string {
	var out []string
	for _, s := range rotatables() {
		out = append(out, s.name)
	}
	return out
}

// beside is the file's name with a word before its extension.
func beside(file, word string) string {
	ext := filepath.Ext(file)
	return strings.TrimSuffix(file, ext) + "-" + word + ext
}

func (a *app) configRotateCommand() *cli.Command {
	return &cli.Command{
		Name: "rotate", Usage: "replace the route password, the issuer, the xkey or the key of a service in three stages", ArgsUsage: "SECRET...",
		Description: "        issuer, xkey                 a service, ops, sys          route-password\n" +
			"trust   callouts accept both         servers accept both          routes stand on their certificates alone\n" +
			"issue   servers use the new one      the service uses the new     every node says the new one\n" +
			"retire  callouts forget the old one  servers forget the old one   the new one is demanded\n\n" +
			"SECRET is one of: " + strings.Join(rotatableNames(), ", ") + ".\n" +
			"Several go through a stage together. Changes the secrets directory only; `deploy stage` and the rollout that it names bring the stage to the\n" +
			"nodes. The next stage is refused until every node has the one before, on its disk and running.\n" +
			"Shows what it would do until it is told --yes.\n\n" +
			"   unibusctl config rotate issuer --stage trust --secrets secrets --pki pki --inventory nodes.env --sys-seed secrets/sys.nk --yes",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "secrets", Required: true, Usage: "directory of config init"},
			&cli.StringFlag{Name: "stage", Required: true, Usage: "`trust|issue|retire`"},
			&cli.StringFlag{Name: "pki", Required: true, Usage: "directory of pki init and pki issue"},
			&cli.StringFlag{Name: "inventory", Required: true, TakesFile: true, Usage: "nodes.env"},
			a.sysSeedFlag(),
			&cli.StringFlag{Name: "ssh-config", TakesFile: true, Usage: "`FILE` for ssh -F"},
			localFlag(),
		},
		Action: a.configRotate,
	}
}

// secretStage is how far the replacement of a secret is, as its files show it.
// Between NAME-old being written and NAME-next taking the place of NAME both are
// there: issue has not happened then.
func secretStage(dir string, s rotatable) string {
	switch {
	case exists(filepath.Join(dir, beside(s.file, "next"))):
		return stageTrust
	case exists(filepath.Join(dir, beside(s.file, "old"))):
		return stageIssue
	}
	return ""
}

// rotatedSecret is one secret in the JSON of rotate.
type rotatedSecret struct {
	Secret  string `json:"secret"`
	Already bool   `json:"already"` // had the stage before
}

func (a *app) configRotate(c *cli.Context) error {
	stage, dir := c.String("stage"), c.String("secrets")
	if c.NArg() == 0 {
		return usagef("SECRET is missing")
	}
	if err := oneOf(stage, stageTrust, stageIssue, stageRetire); err != nil {
		return usagef("--stage: %v", err)
	}
	if _, err := readSecrets(dir); err != nil {
		return err
	}
	var chosen []rotatable
	var out []rotatedSecret
	due := false
	for _, name := range c.Args().Slice() {
		i := slices.IndexFunc(rotatables(), func(s rotatable) bool { return s.name == name })
		if i < 0 {
			return usagef("%s is none of %s", quote(name), strings.Join(rotatableNames(), ", "))
		}
		s := rotatables()[i]
		done := secretStage(dir, s)
		if err := inTurn(s.name, done, stage); err != nil {
			return err
		}
		already := done == stage || (done == "" && stage == stageRetire)
		chosen, out, due = append(chosen, s), append(out, rotatedSecret{s.name, already}), due || !already
	}
	// Nothing has to be anywhere before trust.
	if due && stage != stageTrust {
		if err := a.everyNodeHas(c, dir); err != nil {
			return err
		}
	}
	act := ""
	for _, s := range chosen {
		act = max(act, s.act) // a restart does what a reload does
		if !a.set.yes {
			continue
		}
		if err := turnSecret(a, dir, s, stage); err != nil {
			return err
		}
	}
	next := fmt.Sprintf("unibusctl deploy stage ... --yes, and %s ... --yes", act)
	if a.set.yes {
		a.say("Next: %s; then the stage after %s", next, stage)
	} else {
		a.say("Nothing was changed. Next: the same with --yes")
	}
	return a.print(map[string]any{"stage": stage, "done": a.set.yes, "secrets": out}, func(t table.Writer) {
		t.AppendHeader(table.Row{"secret", "stage", "done", "then"})
		for _, s := range out {
			t.AppendRow(table.Row{s.Secret, stage, a.set.yes || s.Already, next})
		}
	})
}

// inTurn refuses a stage whose turn it is not.
func inTurn(what, done, want string) error {
	switch {
	case want == stageTrust && done == stageIssue:
		return bus.E(bus.Conflict, "the new %s is in use already: the stage after issue is retire", what)
	case want == stageIssue && done == "":
		return bus.E(bus.Conflict, "there is no new %s: the stage before is trust", what)
	case want == stageRetire && done == stageTrust:
		return bus.E(bus.Conflict, "the new %s is not in use yet: the stage before is issue", what)
	}
	return nil
}

// turnSecret brings the secrets directory to the stage. Repeated after a crash
// it finishes what was begun, and a done stage stays as it is.
func turnSecret(a *app, dir string, s rotatable, stage string) error {
	now, next, old := filepath.Join(dir, s.file), filepath.Join(dir, beside(s.file, "next")), filepath.Join(dir, beside(s.file, "old"))
	switch stage {
	case stageTrust:
		if exists(next) {
			return nil
		}
		return s.make(next, a)
	case stageIssue:
		if !exists(next) {
			return nil
		}
		data, err := readSecret(now)
		if err != nil {
			return err
		}
		if err := writeFile(old, data, 0o600, true); err != nil {
			return err
		}
		if err := os.Rename(next, now); err != nil {
			return fmt.Errorf("put the new %s in its place: %w", s.name, err)
		}
		return nil
	}
	if err := os.Remove(old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the old %s: %w", s.name, err)
	}
	return nil
}

// everyNodeHas refuses to go on while a node is not where the secrets directory
// is: by its files, by what its server says that it runs and, over ssh, by the
// seeds that its services were started with.
func (a *app) everyNodeHas(c *cli.Context, secrets string) error {
	inv, hosts, err := a.pkiHosts(c)
	if err != nil {
		return err
	}
	seed, err := a.sysSeedOf(c)
	if err != nil {
		return err
	}
	if a.set.ca == "" {
		a.set.ca = pkiDir(c.String("pki")).caCert(clientCA)
	}
	g := &gate{app: a, inv: inv, request: doctorRequest{inventory: inv.path, sysSeed: seed}}
	for _, h := range hosts {
		r := renderRequest{inventory: inv.path, secrets: secrets, pki: c.String("pki"), node: h.node.name, etc: deployEtc, state: deployState}
		if h.ssh == nil {
			r.etc, r.state = h.etc, filepath.Join(filepath.Dir(h.etc), "state")
		}
		if err := a.nodeHas(c.Context, g, h, r); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) nodeHas(ctx context.Context, g *gate, h *pkiHost, r renderRequest) error {
	files, err := r.files()
	if err != nil {
		return err
	}
	files = slices.DeleteFunc(files, func(f nodeFile) bool {
		return !strings.HasPrefix(f.name, "nats/") && !strings.HasPrefix(f.name, "creds/")
	})
	changed, err := h.differs(ctx, files)
	if err != nil {
		return err
	}
	const hint = "unibusctl deploy stage ... --yes, then the rollout"
	if len(changed) > 0 {
		return bus.E(bus.Conflict, "%s does not have the stage before on its disk: %s", h.node.name, strings.Join(changed, ", ")).WithHint(hint)
	}
	z, err := g.varz(ctx, h.node)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(files, func(f nodeFile) bool { return f.name == nodeConf })
	if want := z.Metadata["unibus_config"]; want == "" || !strings.Contains(string(files[i].data), want) {
		return bus.E(bus.Conflict, "the server of %s does not run the stage before yet", h.node.name).WithHint(hint)
	}
	if h.ssh == nil {
		return nil
	}
	lines, err := h.ssh.run(ctx, "report")
	if err != nil {
		return err
	}
	if stale := unitsIn(lines, func(f []string) bool { return f[2] != "no" || f[1] != "active" }); len(stale) > 0 {
		return bus.E(bus.Conflict, "on %s %s does not run with what is on its disk", h.node.name, strings.Join(stale, ", ")).WithHint("unibusctl cluster rollout upgrade ... --yes")
	}
	return nil
}
