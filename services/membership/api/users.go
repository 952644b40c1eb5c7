package api

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/kv"
)

// page is the part of a list that a request asks for.
const (
	defaultPage = 100
	maxPage     = 500
)

// cut is one page of a sorted list: what comes after the cursor. Names that
// never change order the list, so that whoever is there throughout is neither
// skipped nor shown twice, whatever comes and goes meanwhile.
func cut[T any](sorted []T, limit int, after string, name func(T) string) (page []T, next string) {
	from := 0
	if after != "" {
		from, _ = slices.BinarySearchFunc(sorted, after, func(t T, s string) int { return strings.Compare(name(t), s) })
		if from < len(sorted) && name(sorted[from]) == after {
			from++
		}
	}
	sorted = sorted[from:]
	if len(sorted) <= limit {
		return sorted, ""
	}
	return sorted[:limit], name(sorted[limit-1])
}

type none struct{}

type userPath struct {
	User userName `path:"user"`
}

type usersAnswer struct {
	Users []bus.UserInfo `json:"users"`
	Next  string         `json:"next"`
}

type userAnswer struct {
	User bus.UserDetail `json:"user"`
}

func (u userAnswer) revision() uint64 { return u.User.Revision }

type accessAnswer struct {
	Access bus.AccessInfo `json:"access"`
}

func noUser(name userName) error {
	return bus.E(bus.NotFound, "no user %s", name).WithHint("unibusctl user list")
}

// find resolves whom a request names. Who is not an admin finds active users,
// themselves, and who is or was in the room concerned; everybody else does not
// exist for them, in the very words of who does not exist.
func (a *api) find(c *caller, name userName, room bus.RoomID) (bus.User, error) {
	u, _, err := a.view.FindUser(string(name))
	switch code := bus.CodeOf(err); {
	case code == bus.NotFound:
		return bus.User{}, noUser(name)
	case code == bus.Invalid: // a key that nobody can have
		return bus.User{}, noUser(name)
	case err != nil && !c.admin():
		return bus.User{}, noUser(name) // a record that cannot be read; an admin is told
	case err != nil:
		return bus.User{}, err
	case c.admin(), u.Key == c.key, u.ActiveAt(a.now()):
		return u, nil
	}
	if room != "" {
		if _, _, ok := a.view.Membership(room, u.Key); ok {
			return u, nil
		}
	}
	return bus.User{}, noUser(name)
}

// known is find for an action that needs authorization whether or not the user
// exists: the zero key stands for nobody.
func (a *api) known(c *caller, name userName, room bus.RoomID) bus.UserKey {
	u, err := a.find(c, name, room)
	if err != nil {
		return bus.UserKey{}
	}
	return u.Key
}

func about(k bus.UserKey) func(*caller) target {
	return func(*caller) target { return target{user: k} }
}

func (a *api) me(_ context.Context, c *caller, _ *none) (userAnswer, error) {
	d, err := a.view.UserDetail(c.key)
	return userAnswer{d}, err
}

type encryptionKeyRequest struct {
	Body encryptionKeyBody
}

type encryptionKeyBody struct {
	N         int64     `json:"n" minimum:"1" doc:"counts the keys of one user; only a higher one replaces a key"`
	Public    []byte    `json:"public" doc:"1216 bytes: ML-KEM-768 and X25519"`
	CreatedAt time.Time `json:"created_at"`
	Signature []byte    `json:"signature" doc:"of the identity key, over the bytes that docs/protocol.md gives"`
}

func (a *api) setEncryptionKey(c *caller, in *encryptionKeyRequest) (plan, error) {
	k := bus.EncryptionKey{N: uint64(in.Body.N), Public: in.Body.Public, CreatedAt: in.Body.CreatedAt, Signature: in.Body.Signature}
	if err := k.Verify(c.key); err != nil {
		return plan{}, err
	}
	return plan{
		action: meEncryptionKey, target: about(c.key),
		do: func(ctx context.Context, s *kv.Store) (effect, error) {
			return changed(s.SetEncryptionKey(ctx, c.key, k))
		},
	}, nil
}

type listUsers struct {
	Limit  int        `query:"limit" minimum:"1" maximum:"500" default:"100"`
	After  string     `query:"after" doc:"next of the page before"`
	Status bus.Status `query:"status"`
	Role   bus.Role   `query:"role"`
}

func (a *api) users(_ context.Context, c *caller, in *listUsers) (usersAnswer, error) {
	if err := a.authorize(c, userList, target{}); err != nil {
		return usersAnswer{}, err
	}
	if in.After != "" {
		if _, err := bus.ParseUserKey(in.After); err != nil {
			return usersAnswer{}, invalid("after is not a cursor that this list gave")
		}
	}
	all := slices.DeleteFunc(a.view.Users(), func(u kv.UserRevision) bool {
		return in.Status != "" && u.Status != in.Status || in.Role != "" && u.Role != in.Role
	})
	slices.SortFunc(all, func(x, y kv.UserRevision) int { return slices.Compare(x.Key[:], y.Key[:]) })
	page, next := cut(all, in.Limit, in.After, func(u kv.UserRevision) string { return u.Key.Hex() })
	out := usersAnswer{Users: make([]bus.UserInfo, 0, len(page)), Next: next}
	for _, u := range page {
		out.Users = append(out.Users, kv.UserInfoOf(u))
	}
	return out, nil
}

func (a *api) user(_ context.Context, c *caller, in *userPath) (userAnswer, error) {
	u, err := a.find(c, in.User, "")
	if err != nil {
		return userAnswer{}, err
	}
	if err := a.authorize(c, userShow, target{user: u.Key}); err != nil {
		return userAnswer{}, err
	}
	d, err := a.view.UserDetail(u.Key)
	if !c.admin() && u.Key != c.key {
		d.Rooms = []bus.RoomGrant{} // which rooms others are in is told to admins
	}
	return userAnswer{d}, err
}

type addUserRequest struct {
	Body addUserBody
}

type addUserBody struct {
	SignPub newKey     `json:"sign_pub"`
	Handle  bus.Handle `json:"handle"`
	Role    bus.Role   `json:"role"`
}

func (a *api) addUser(_ *caller, in *addUserRequest) (plan, error) {
	k, err := bus.ParseUserKey(string(in.Body.SignPub))
	if err != nil {
		return plan{}, err
	}
	return plan{
		action: userAdd, target: about(k), detail: summary("handle", string(in.Body.Handle), "role", string(in.Body.Role)),
		do: func(ctx context.Context, s *kv.Store) (effect, error) {
			return changed(s.AddUser(ctx, k, in.Body.Handle, in.Body.Role))
		},
	}, nil
}

type patchUserRequest struct {
	User    userName    `path:"user"`
	IfMatch revisionTag `header:"If-Match"`
	Body    patchUserBody
}

type patchUserBody struct {
	Handle    *bus.Handle `json:"handle"`
	Role      *bus.Role   `json:"role"`
	ExpiresAt patchTime   `json:"expires_at" doc:"null: never"`
}

func (a *api) patchUser(c *caller, in *patchUserRequest) (plan, error) {
	p := kv.UserPatch{
		Handle: in.Body.Handle, Role: in.Body.Role, Expires: in.Body.ExpiresAt.set, ExpiresAt: in.Body.ExpiresAt.value,
		Revision: in.IfMatch.revision(),
	}
	if p.Handle == nil && p.Role == nil && !p.Expires {
		return plan{}, invalid("nothing to change: give handle, role or expires_at")
	}
	var words []string
	if p.Handle != nil {
		words = append(words, "handle", string(*p.Handle))
	}
	if p.Role != nil {
		words = append(words, "role", string(*p.Role))
	}
	if p.Expires {
		words = append(words, "expiry")
	}
	return a.aboutUser(c, in.User, userPatch, summary(words...), func(ctx context.Context, s *kv.Store, k bus.UserKey) (kv.Result, error) {
		return s.PatchUser(ctx, k, p)
	})
}

// aboutUser plans a change of somebody's record.
func (a *api) aboutUser(c *caller, name userName, act action, detail string, do func(context.Context, *kv.Store, bus.UserKey) (kv.Result, error)) (plan, error) {
	if err := a.authorize(c, act, target{user: a.known(c, name, "")}); err != nil {
		return plan{}, err
	}
	u, err := a.find(c, name, "")
	if err != nil {
		return plan{}, err
	}
	return plan{
		action: act, target: about(u.Key), detail: detail,
		do: func(ctx context.Context, s *kv.Store) (effect, error) { return changed(do(ctx, s, u.Key)) },
	}, nil
}

func (a *api) revokeUser(c *caller, in *userPath) (plan, error) {
	return a.aboutUser(c, in.User, userRevoke, "", func(ctx context.Context, s *kv.Store, k bus.UserKey) (kv.Result, error) { return s.RevokeUser(ctx, k) })
}

func (a *api) suspendUser(c *caller, in *userPath) (plan, error) {
	return a.aboutUser(c, in.User, userSuspend, "", func(ctx context.Context, s *kv.Store, k bus.UserKey) (kv.Result, error) { return s.SuspendUser(ctx, k) })
}

func (a *api) resumeUser(c *caller, in *userPath) (plan, error) {
	return a.aboutUser(c, in.User, userResume, "", func(ctx context.Context, s *kv.Store, k bus.UserKey) (kv.Result, error) { return s.ResumeUser(ctx, k) })
}

type rotateRequest struct {
	User userName `path:"user"`
	Body rotateBody
}

type rotateBody struct {
	SignPub newKey `json:"sign_pub" doc:"the key that takes over"`
}

func (a *api) rotateUser(c *caller, in *rotateRequest) (plan, error) {
	next, err := bus.ParseUserKey(string(in.Body.SignPub))
	if err != nil {
		return plan{}, err
	}
	p, err := a.aboutUser(c, in.User, userRotate, summary("to", next.NKey()), func(ctx context.Context, s *kv.Store, k bus.UserKey) (kv.Result, error) {
		return s.RotateUser(ctx, k, next)
	})
	// Who rotates themselves is revoked by it before the new key is in place.
	p.survives = func(u bus.User) bool { return u.RotatedTo != nil && *u.RotatedTo == next }
	return p, err
}

func (a *api) userAccess(_ context.Context, c *caller, in *userPath) (accessAnswer, error) {
	if err := a.authorize(c, userAccess, target{user: a.known(c, in.User, "")}); err != nil {
		return accessAnswer{}, err
	}
	u, err := a.find(c, in.User, "")
	if err != nil {
		return accessAnswer{}, err
	}
	x, err := a.view.Explain(u.Key, a.now())
	return accessAnswer{x}, err
}

// The routes about users.
func userOperations() []operation {
	notFound := []int{http.StatusForbidden, http.StatusNotFound}
	changes := []int{http.StatusForbidden, http.StatusNotFound, http.StatusConflict}
	return []operation{
		read(spec{
			id: "showMe", method: http.MethodGet, path: "/v1/me", tag: "users", summary: "Show the caller",
			answer: userAnswer{exampleDetail},
		}, (*api).me),
		change[encryptionKeyRequest, bus.Change](spec{
			id: "setEncryptionKey", method: http.MethodPut, path: "/v1/me/encryption-key", tag: "users", summary: "Publish the caller's encryption key",
			detail: "The key to which room keys are sealed. It must be signed by the identity key and counted higher than the one before.",
			body:   exampleEncryptionKey, answer: exampleChange, errors: []int{http.StatusConflict},
		}, http.StatusOK, (*api).setEncryptionKey),
		change[addUserRequest, bus.Change](spec{
			id: "addUser", method: http.MethodPost, path: "/v1/users", tag: "users", summary: "Register a user",
			detail: "Admins only. A key that was ever registered is a conflict, whatever became of it.",
			body:   addUserBody{exampleHex, "alice", bus.Member}, answer: exampleChange, errors: []int{http.StatusForbidden, http.StatusConflict},
		}, http.StatusCreated, (*api).addUser),
		read(spec{
			id: "listUsers", method: http.MethodGet, path: "/v1/users", tag: "users", summary: "List users",
			detail: "Admins only. Sorted by key; give next as after for the following page, until it is empty.",
			answer: usersAnswer{[]bus.UserInfo{exampleUser}, ""}, errors: []int{http.StatusForbidden},
		}, (*api).users),
		read(spec{
			id: "showUser", method: http.MethodGet, path: "/v1/users/{user}", tag: "users", summary: "Show a user",
			detail: "Admins see everybody. Others see themselves, and active users without their rooms; nobody else exists for them.",
			answer: userAnswer{exampleDetail}, errors: []int{http.StatusNotFound},
		}, (*api).user),
		change[patchUserRequest, bus.Change](spec{
			id: "changeUser", method: http.MethodPatch, path: "/v1/users/{user}", tag: "users", summary: "Change handle, role or expiry",
			detail: "Admins only. With If-Match, only if the record is still at that revision, else 409.",
			body:   map[string]any{"role": bus.Admin, "expires_at": nil}, answer: exampleChange, errors: changes,
		}, http.StatusOK, (*api).patchUser),
		change[userPath, bus.Change](spec{
			id: "revokeUser", method: http.MethodPost, path: "/v1/users/{user}/revoke", tag: "users", summary: "Revoke a user for good",
			detail: "Admins only. Goes on when the audit cannot be written.", answer: exampleChange, errors: changes,
		}, http.StatusOK, (*api).revokeUser),
		change[userPath, bus.Change](spec{
			id: "suspendUser", method: http.MethodPost, path: "/v1/users/{user}/suspend", tag: "users", summary: "Suspend a user",
			detail: "Admins only. Goes on when the audit cannot be written.", answer: exampleChange, errors: changes,
		}, http.StatusOK, (*api).suspendUser),
		change[userPath, bus.Change](spec{
			id: "resumeUser", method: http.MethodPost, path: "/v1/users/{user}/resume", tag: "users", summary: "End a suspension",
			detail: "Admins only.", answer: exampleChange, errors: changes,
		}, http.StatusOK, (*api).resumeUser),
		change[rotateRequest, bus.Change](spec{
			id: "rotateUser", method: http.MethodPost, path: "/v1/users/{user}/rotate", tag: "users", summary: "Give a user a new key",
			detail: "Admins, and users themselves. Handle, role and rooms go to the new key; the old one is revoked. Repeating it finishes what was interrupted.",
			body:   rotateBody{exampleHex}, answer: exampleChange, errors: changes,
		}, http.StatusOK, (*api).rotateUser),
		read(spec{
			id: "explainAccess", method: http.MethodGet, path: "/v1/users/{user}/access", tag: "users", summary: "Explain what a user may do on NATS",
			detail: "Admins, and users themselves. The subjects are exactly those of the credential that would be minted now.",
			answer: accessAnswer{exampleAccess}, errors: notFound,
		}, (*api).userAccess),
	}
}
