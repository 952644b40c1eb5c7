package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"unibus.internal/bus"
	"unibus.internal/bus/client"
	"unibus.internal/bus/sig"
)

// overAPI is the backend behind the membership API.
type overAPI struct{ *client.Client }

// openAPI connects to nothing yet: what is missing is said before anything is
// sent.
func (a *app) openAPI() (*overAPI, error) {
	if a.set.identity == "" {
		return nil, &usageError{msg: "the API wants to know who asks: set --identity FILE or UNIBUS_IDENTITY", hint: "unibusctl identity new --out FILE, or unibusctl join"}
	}
	identity, err := readSigner(a.set.identity)
	if err != nil {
		return nil, err
	}
	c, err := a.apiClient(a.set.apiURL, a.set.ca, identity)
	if err != nil {
		return nil, err
	}
	return &overAPI{c}, nil
}

func (b *overAPI) Users(ctx context.Context) ([]bus.UserInfo, error) {
	return b.AllUsers(ctx, client.UserQuery{Limit: 500})
}

func (b *overAPI) Rooms(ctx context.Context) ([]bus.RoomInfo, error) {
	me, err := b.Me(ctx) // who asks for what they may not see leaves a denial in the audit
	if err != nil {
		return nil, err
	}
	return b.AllRooms(ctx, client.RoomQuery{All: me.Role == bus.Admin, Limit: 500})
}

// VerifyAudit has a node verify, and holds what it reports to the signers here.
func (b *overAPI) VerifyAudit(ctx context.Context, signers []string) (bus.AuditReport, error) {
	r, err := b.Client.VerifyAudit(ctx)
	if err != nil || len(signers) == 0 {
		return r, err
	}
	for _, s := range r.Signers {
		if !slices.Contains(signers, s) {
			r.OK = false
			r.Findings = append(r.Findings, bus.AuditFinding{Problem: "checkpoints are signed by " + s + ", which is not trusted"})
		}
	}
	return r, nil
}

// AfterWrite: the API does not tell how the streams are replicated.
func (b *overAPI) AfterWrite(context.Context) string { return "" }

// apiClient is a client of those APIs. Everything that is missing is a usage
// error that names its setting.
func (a *app) apiClient(urls, ca string, identity sig.Signer) (*client.Client, error) {
	if ca == "" {
		return nil, &usageError{msg: "the CA is not known: set --ca FILE or UNIBUS_CA", hint: "unibusctl env"}
	}
	if _, err := bus.Roots(ca); err != nil {
		return nil, err
	}
	// By file: a command that runs for long outlives a change of the authority.
	return a.clientOf(client.Config{URLs: strings.Split(urls, ","), CAFile: ca, Identity: identity}, "set --api-url URLS or UNIBUS_API_URL; unibusctl env shows what is used")
}

func (a *app) clientOf(cfg client.Config, hint string) (*client.Client, error) {
	cfg.Now, cfg.Rand = a.now, a.rand
	c, err := client.New(cfg)
	if err != nil {
		return nil, &usageError{msg: err.Error(), hint: hint}
	}
	return c, nil
}

// readSigner reads an identity to sign requests with.
func readSigner(path string) (*sig.Identity, error) {
	data, err := readSecret(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, bus.E(bus.Invalid, "there is no key in %s: %w", path, err).WithHint("unibusctl identity new --out %s", path)
	}
	if err != nil {
		return nil, err
	}
	defer clear(data)
	id, err := sig.ParseIdentity(data)
	if err != nil {
		return nil, bus.E(bus.Invalid, "%s: %w", path, err).WithHint("unibusctl identity new --out FILE")
	}
	return id, nil
}

func (a *app) apiCommand() *cli.Command {
	return &cli.Command{
		Name: "api", ArgsUsage: "METHOD PATH", Category: "tools",
		Usage: "sign any request to the API and print what is answered",
		Description: "The body of the answer goes to stdout as it came, also that of a refusal. Ends with 0 for a\n" +
			"success, 1 for a refusal, 3 for 202 (committed, not proven), 429 and 503. GET /openapi.json says\n" +
			"what there is. PUT and DELETE are sent again when an answer is lost, POST and PATCH are not.\n\n" +
			"   unibusctl api GET '/v1/users?status=suspended'\n" +
			"   unibusctl api PATCH /v1/rooms/ops --data '{\"description\":\"on call\"}'\n" +
			"   unibusctl api POST /v1/users --data @user.json",
		Flags:  []cli.Flag{&cli.StringFlag{Name: "data", Usage: "body of the request: `JSON`, @FILE, or - for stdin"}},
		Action: a.apiRequest,
	}
}

func (a *app) apiRequest(c *cli.Context) error {
	arg, err := positional(c, "METHOD", "PATH")
	if err != nil {
		return err
	}
	if a.set.direct {
		return &usageError{msg: "api speaks to the API and not to the KV: leave --direct out"}
	}
	body, err := a.requestBody(c.String("data"))
	if err != nil {
		return err
	}
	b, err := a.openAPI()
	if err != nil {
		return err
	}
	defer b.Close()
	ctx, cancel := a.within(c.Context, changeWithin)
	defer cancel()
	status, header, answer, err := b.Do(ctx, strings.ToUpper(arg[0]), arg[1], body)
	if err != nil {
		return err
	}
	if len(answer) > 0 && !bytes.HasSuffix(answer, []byte("\n")) {
		answer = append(answer, '\n')
	}
	if _, err := a.out.Write(answer); err != nil {
		return err
	}
	if status == http.StatusAccepted {
		return bus.E(bus.Unavailable, "committed, not proven").WithHint("repeat %s: it proves again", a.command)
	}
	return client.ErrorOf(status, header, answer)
}

// requestBody reads --data, which has to be JSON: everything else would only be
// refused at the other end.
func (a *app) requestBody(data string) (body []byte, err error) {
	name, isFile := strings.CutPrefix(data, "@")
	switch {
	case data == "":
		return nil, nil
	case data == "-":
		body, err = io.ReadAll(io.LimitReader(a.in, sig.MaxBody+1))
	case isFile:
		body, err = os.ReadFile(name)
	default:
		body = []byte(data)
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("read the body: %w", err)
	case len(body) > sig.MaxBody:
		return nil, bus.E(bus.Invalid, "the body is larger than 64 KiB")
	case !json.Valid(body):
		return nil, usagef("--data is no JSON")
	}
	return body, nil
}
