package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

func (a *app) importCommand() *cli.Command {
	return &cli.Command{
		Name:     "import",
		Category: "access",
		Usage:    "take users, rooms and members over from the old system",
		Description: "Reads one source and changes nothing there. Without --yes it only reports: what the source holds, what would\n" +
			"be made, what is here already, what contradicts, what is not understood. Nothing is guessed: --map says where\n" +
			"each field is (a field of the record, a.b inside another, @key for the key of an entry, @key.2 for its second\n" +
			"part), --set gives all records one value, --value translates a word (@null: none; @any: every other one), --fix\n" +
			"corrects one record. What has ended here stays so, and nobody becomes an admin who is not in --admins. Run\n" +
			"again it goes on where it was interrupted, and finds everything there in the end.\n\n" +
			"   unibusctl --direct import --from-nats tls://127.0.0.1:4250 --nkey internal.id --from-ca old-ca.crt\n" +
			"   unibusctl --direct import --from-nats tls://127.0.0.1:4250 --nkey internal.id --from-ca old-ca.crt \\\n" +
			"      --map users=UNIBUS_users --map users.status=state --value users.status:disabled=suspended \\\n" +
			"      --ignore UNIBUS_nonces --yes",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "from-nats", Usage: "`URL` of the old cluster: its KV buckets; TLS unless it is this machine"},
			&cli.StringFlag{Name: "nkey", TakesFile: true, Usage: "`FILE` with the seed of a user there who may read the buckets"},
			&cli.StringFlag{Name: "from-ca", TakesFile: true, Usage: "`FILE` with the CA there; default: that of --ca"},
			&cli.StringFlag{Name: "from-sqlite", TakesFile: true, Usage: "`FILE` of a SQLite database, unibus.db"},
			&cli.StringSliceFlag{Name: "from-ndjson", TakesFile: true, Usage: "`[KIND=]FILE` with one JSON object a line; - is standard input (repeat)"},
			&cli.StringFlag{Name: "kind-field", Usage: "`FIELD` that tells the kind of a line, in a file of several"},
			&cli.StringSliceFlag{Name: "map", Usage: "`KIND=CONTAINER` or KIND.FIELD=SOURCE (repeat)"},
			&cli.StringSliceFlag{Name: "set", Usage: "`KIND.FIELD=VALUE` for all records (repeat)"},
			&cli.StringSliceFlag{Name: "value", Usage: "`KIND.FIELD:THERE=HERE` (repeat)"},
			&cli.StringSliceFlag{Name: "fix", Usage: "`KIND/RECORD.FIELD=VALUE` for one record (repeat)"},
			&cli.StringSliceFlag{Name: "ignore", Usage: "`CONTAINER` that is not taken over (repeat)"},
			&cli.StringSliceFlag{Name: "admins", Usage: "`USER` who is an admin there and may be one here (repeat)"},
			&cli.StringFlag{Name: "times", Value: timeRFC3339, Usage: "how times are written there: `rfc3339|unix|unix-ms`"},
			&cli.BoolFlag{Name: "partial", Usage: "with --yes: take over the rest, although some cannot be"},
			dryRunFlag(),
		},
		Action: a.importFrom,
	}
}

// importReport is the JSON of an import.
type importReport struct {
	Source     string                         `json:"source"`
	DryRun     bool                           `json:"dry_run"`
	Complete   bool                           `json:"complete"` // nothing of the source is left over
	Containers []containerReport              `json:"containers"`
	Missing    []string                       `json:"missing"` // fields without a --map or --set
	Counts     map[importKind]map[outcome]int `json:"counts"`
	Items      []importItem                   `json:"items"`
	OnlyHere   map[importKind][]string        `json:"only_here"`
}

type containerReport struct {
	Name    string        `json:"name"`
	Use     string        `json:"use"` // users, rooms, members, ignored or unknown
	Records int           `json:"records"`
	Deleted int           `json:"deleted"` // keys whose last entry is a deletion
	Moved   bool          `json:"moved"`   // written to while it was read
	Fields  []fieldReport `json:"fields"`
}

type fieldReport struct {
	Name    string      `json:"name"`
	Types   []valueKind `json:"types"`
	Records int         `json:"records"`
}

func (a *app) importFrom(c *cli.Context) error {
	if _, err := positional(c); err != nil {
		return err
	}
	source, err := a.importSource(c)
	if err != nil {
		return err
	}
	m, err := newMapping(c.StringSlice("map"), c.StringSlice("set"), c.StringSlice("value"), c.StringSlice("fix"), c.StringSlice("ignore"), c.String("times"))
	if err != nil {
		return err
	}
	if s, ok := source.(*ndjsonSource); ok {
		if err := s.addKinds(m); err != nil {
			return err
		}
	}
	act := a.set.yes && !c.Bool("dry-run")
	if !a.set.direct && len(m.containers) > 0 {
		return &usageError{msg: "an import works on the live KV only", hint: a.command + " --direct ..., on a node, with --ops-seed FILE"}
	}
	reading, cancel := a.within(c.Context, sourceWithin)
	defer cancel()
	containers, err := source.read(reading, func(name string) bool { return slices.Contains(m.ignored, name) })
	if err != nil {
		return err
	}
	r := &importReport{Source: source.String(), DryRun: !act, Missing: []string{}, Items: []importItem{}, Counts: counted(nil), OnlyHere: map[importKind][]string{}}
	if err := r.describe(containers, m); err != nil {
		return err
	}
	if len(r.Missing) > 0 || len(m.containers) == 0 {
		return a.importUnmapped(r)
	}
	return a.importInto(c, r, m, containers, act)
}

func (a *app) importSource(c *cli.Context) (importSource, error) {
	var out []importSource
	ca := cmp.Or(c.String("from-ca"), a.set.ca)
	if u := c.String("from-nats"); u != "" {
		s := &natsSource{url: u, seedFile: c.String("nkey"), caFile: ca}
		if _, err := s.secure(); err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	if f := c.String("from-sqlite"); f != "" {
		out = append(out, &sqliteSource{path: f})
	}
	if files := c.StringSlice("from-ndjson"); len(files) > 0 {
		s := &ndjsonSource{kindField: c.String("kind-field"), stdin: a.in}
		for _, f := range files {
			kind, path, ok := strings.Cut(f, "=")
			if !ok || importFields[importKind(kind)] == nil {
				kind, path = "", f
			}
			if kind == "" && s.kindField == "" {
				return nil, usagef("what are the lines of %s? --from-ndjson users=%s (rooms, members), or --kind-field FIELD", quote(f), f)
			}
			s.files = append(s.files, namedFile{kind, path})
		}
		out = append(out, s)
	}
	if len(out) != 1 {
		return nil, usagef("name one source: --from-nats URL, --from-sqlite FILE or --from-ndjson FILE")
	}
	return out[0], nil
}

// addKinds maps each kind that a file was given as.
func (s *ndjsonSource) addKinds(m *mapping) error {
	for _, f := range s.files {
		if f.container == "" {
			continue
		}
		if other, ok := m.containers[importKind(f.container)]; ok && other != f.container {
			return usagef("--map %s=%s contradicts --from-ndjson %s=...", f.container, other, f.container)
		}
		m.containers[importKind(f.container)] = f.container
	}
	return nil
}

// describe says what the source holds: names and types, never values, for among
// them may be keys.
func (r *importReport) describe(containers []container, m *mapping) error {
	names := map[string]bool{}
	r.Containers = []containerReport{}
	for _, c := range containers {
		names[c.name] = true
		out := containerReport{Name: c.name, Use: "unknown", Records: len(c.records) + c.unread, Deleted: c.deleted, Moved: c.moved, Fields: []fieldReport{}}
		if kind, ok := m.kindOf(c.name); ok {
			out.Use = string(kind)
		} else if slices.Contains(m.ignored, c.name) {
			out.Use = "ignored"
		}
		fields := map[string]*fieldReport{}
		for _, rec := range c.records {
			for name, v := range rec.fields {
				f := fields[name]
				if f == nil {
					if len(fields) == maxImportFields {
						continue
					}
					f = &fieldReport{Name: name}
					fields[name] = f
				}
				f.Records++
				if !slices.Contains(f.Types, v.kind) {
					f.Types = append(f.Types, v.kind)
				}
			}
		}
		for _, name := range slices.Sorted(maps.Keys(fields)) {
			slices.Sort(fields[name].Types)
			out.Fields = append(out.Fields, *fields[name])
		}
		r.Containers = append(r.Containers, out)
	}
	for _, kind := range importKinds {
		name, ok := m.containers[kind]
		if !ok {
			continue
		}
		if slices.Contains(m.ignored, name) {
			return usagef("%s is mapped and ignored", quote(name))
		}
		if !names[name] {
			return bus.E(bus.NotFound, "the source has no %s for %s; it has %s", quote(name), kind, listed(slices.Sorted(maps.Keys(names)))).WithHint("--map %s=NAME", kind)
		}
		r.Missing = append(r.Missing, m.missing(kind)...)
	}
	return nil
}

func listed(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	for i := range names {
		names[i] = quote(names[i])
	}
	return strings.Join(names, ", ")
}

// importUnmapped shows what there is to map.
func (a *app) importUnmapped(r *importReport) error {
	r.DryRun = true
	if err := a.printImport(r); err != nil {
		return err
	}
	if len(r.Missing) > 0 {
		return bus.E(bus.Invalid, "nothing was changed: nobody says what %s are", strings.Join(r.Missing, ", ")).
			WithHint("for each --map KIND.FIELD=SOURCE, or --set KIND.FIELD=VALUE if it is the same for all")
	}
	return bus.E(bus.Invalid, "nothing was changed: nobody says what the records are").WithHint("--map users=NAME --map rooms=NAME --map members=NAME, and --ignore NAME")
}

// importInto holds the source against this cluster, reports, and acts if told.
func (a *app) importInto(c *cli.Context, r *importReport, m *mapping, containers []container, act bool) error {
	source := m.understand(containers)
	for fix := range m.fixes {
		if !m.used[fix] {
			return bus.E(bus.Invalid, "--fix %s meets no record", quote(fix)).WithHint("the report names them: users/U..., rooms/ROOM, members/ROOM/USER")
		}
	}
	admins, err := adminsOf(c.StringSlice("admins"), source)
	if err != nil {
		return err
	}
	d, err := a.openDirect(c.Context)
	if err != nil {
		return err
	}
	defer d.Close()
	p := &planner{here: hereOf(d.view, a.now()), source: source, admins: admins, mapped: map[importKind]bool{}}
	for kind := range m.containers {
		p.mapped[kind] = true
	}
	p.plan()
	r.Items, r.Counts, r.OnlyHere = p.items, counted(p.items), p.onlyHere
	left := r.leftOver()
	r.Complete = left == ""
	switch {
	case len(p.here.users) == 0 && len(p.here.unreadable) == 0:
		if err := a.printImport(r); err != nil {
			return err
		}
		return bus.E(bus.Conflict, "nothing was changed: there is no first admin yet").WithHint("unibusctl --direct bootstrap --handle NAME --sign-pub KEY")
	case act && left != "" && !c.Bool("partial"):
		r.DryRun, act = true, false
		if err := a.printImport(r); err != nil {
			return err
		}
		return bus.E(bus.Conflict, "nothing was changed: %s", left).WithHint("--map, --value, --fix or --ignore them; or --partial takes over the rest")
	}
	var failed error
	if act {
		failed = d.importAll(c.Context, r.Items)
		left = r.leftOver()
		r.Counts, r.Complete = counted(r.Items), left == "" && failed == nil
	}
	if err := a.printImport(r); err != nil {
		return err
	}
	switch {
	case failed != nil:
		return failed
	case !act:
		a.say("nothing was changed. Next: the same with --yes")
	}
	if left != "" && (!act || !c.Bool("partial")) {
		return bus.E(bus.Conflict, "%s", left).WithHint("--map, --value, --fix or --ignore them; or --partial takes over the rest")
	}
	return nil
}

// leftOver says what of the source would not be here afterwards, "" if nothing.
func (r *importReport) leftOver() string {
	var out []string
	for _, c := range r.Containers {
		switch {
		case c.Moved:
			out = append(out, fmt.Sprintf("%s was written to while it was read: run it again", quote(c.Name)))
		case c.Use == "unknown" && c.Records > 0:
			out = append(out, fmt.Sprintf("%s is neither mapped nor ignored (%d records)", quote(c.Name), c.Records))
		}
	}
	for _, kind := range importKinds {
		for _, o := range []outcome{isAgainst, isUnknown} {
			if n := counted(r.Items)[kind][o]; n > 0 {
				out = append(out, fmt.Sprintf("%d of %s are %s", n, kind, map[outcome]string{isAgainst: "in conflict", isUnknown: "not understood"}[o]))
			}
		}
	}
	return strings.Join(out, "; ")
}

// importAll does what the plan says, one proven change after the other. What
// somebody changed meanwhile becomes a conflict; what cannot be known ends it. A
// revoke that some node has not confirmed does not hold up the others: each of
// them takes access away.
func (d *direct) importAll(ctx context.Context, items []importItem) error {
	due, done := 0, 0
	for _, i := range items {
		if i.Outcome == toCreate || i.Outcome == toRevoke {
			due++
		}
	}
	var unproven []string
	for n := range items {
		i := &items[n]
		if i.Outcome != toCreate && i.Outcome != toRevoke {
			continue
		}
		change, err := d.importOne(ctx, i)
		switch code := bus.CodeOf(err); {
		case code == bus.Unavailable || code == bus.Internal || ctx.Err() != nil && err != nil:
			return bus.E(code, "%d of %d done: %w", done, due, err).WithHint("the same line again goes on")
		case err != nil:
			i.Outcome, i.Detail = isAgainst, err.Error()
			continue
		}
		i.Done = true
		done++
		switch {
		case change.Verified:
		case i.Outcome == toRevoke && len(change.Waiting) == 0:
			unproven = append(unproven, i.Name)
		default:
			return bus.E(bus.Unavailable, "%s: committed, not proven: still waiting for %s; %d of %d done", change.What, strings.Join(change.Waiting, ", "), done, due).
				WithHint("the same line again goes on")
		}
		if done%200 == 0 {
			d.app.say("%d of %d done", done, due)
		}
	}
	if len(unproven) > 0 {
		return bus.E(bus.Unavailable, "all done; revoked, and not proven on every node: %s", strings.Join(unproven, ", ")).
			WithHint("unibusctl user revoke %s --yes proves it again", unproven[0])
	}
	return nil
}

func (d *direct) importOne(ctx context.Context, i *importItem) (bus.Change, error) {
	ctx, cancel := d.app.within(ctx, changeWithin)
	defer cancel()
	switch {
	case i.user != nil:
		u := *i.user
		about := bus.AuditEntry{User: u.Key.NKey(), Detail: fmt.Sprintf("handle %s role %s status %s", u.Handle, u.Role, u.Status)}
		return d.record(ctx, "user.import", about, func() (bus.Change, error) { return kv.ChangeOf(d.slow.ImportUser(ctx, u)) })
	case i.room != nil:
		r := *i.room
		about := bus.AuditEntry{User: r.Creator.NKey(), Room: r.ID}
		return d.record(ctx, "room.import", about, func() (bus.Change, error) { return kv.ChangeOf(d.slow.ImportRoom(ctx, r)) })
	case i.member != nil:
		about := bus.AuditEntry{User: i.member.user.NKey(), Room: i.member.room, Detail: "role " + string(i.role)}
		return d.record(ctx, "room.member.import", about, func() (bus.Change, error) {
			return kv.ChangeOf(d.slow.ImportMember(ctx, i.member.room, i.member.user, i.role))
		})
	case i.Outcome == toRevoke:
		about := bus.AuditEntry{User: i.revoke.NKey(), Detail: "revoked in the system that is imported"}
		return d.record(ctx, "user.revoke", about, func() (bus.Change, error) { return kv.ChangeOf(d.slow.RevokeUser(ctx, i.revoke)) })
	}
	return bus.Change{}, errors.New("an item with nothing to do")
}

// printImport prints the whole report: containers, the fields of those that
// have to be mapped, every record, and the sums.
func (a *app) printImport(r *importReport) error {
	if a.set.json {
		return a.print(r, nil)
	}
	section := func(header table.Row, rows []table.Row) {
		if len(rows) == 0 {
			return
		}
		t := table.NewWriter()
		t.AppendHeader(header)
		t.AppendRows(rows)
		fmt.Fprintln(a.out, a.render(t)+"\n")
	}
	var containers, fields, items, sums []table.Row
	for _, c := range r.Containers {
		note := ""
		if c.Moved {
			note = "written to while it was read"
		}
		containers = append(containers, table.Row{c.Name, c.Use, c.Records, c.Deleted, note})
		for _, f := range c.Fields {
			if len(r.Items) > 0 && c.Use != "unknown" {
				continue
			}
			var types []string
			for _, t := range f.Types {
				types = append(types, string(t))
			}
			fields = append(fields, table.Row{c.Name, f.Name, strings.Join(types, "|"), f.Records})
		}
	}
	for _, i := range r.Items {
		word := string(i.Outcome)
		if i.Done {
			word = map[outcome]string{toCreate: "created", toRevoke: "revoked"}[i.Outcome]
		}
		items = append(items, table.Row{i.Kind, i.Name, word, i.Detail, i.Source})
	}
	for _, kind := range importKinds {
		row := table.Row{kind}
		for _, o := range outcomes {
			row = append(row, r.Counts[kind][o])
		}
		sums = append(sums, append(row, len(r.OnlyHere[kind])))
	}
	section(table.Row{"container", "use", "records", "deleted", ""}, containers)
	section(table.Row{"container", "field", "types", "records"}, fields)
	section(table.Row{"kind", "name", "outcome", "", "source"}, items)
	if len(r.Items) > 0 {
		section(table.Row{"kind", "create", "revoke", "already", "kept", "skipped", "conflict", "unknown", "only here"}, sums)
	}
	for _, kind := range importKinds {
		if names := r.OnlyHere[kind]; len(names) > 0 {
			fmt.Fprintf(a.out, "%s here that the source does not know: %s\n", kind, printable(strings.Join(names, " ")))
		}
	}
	return nil
}
