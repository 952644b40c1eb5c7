package kv

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
)

const (
	// DefaultLease outlives the election of a stream leader, 5 to 8 s.
	DefaultLease = 10 * time.Second
	// MinLease is the shortest lease a service may be configured with.
	MinLease = time.Second
	// clockTolerance is how far a stream's clock may be from our own before a
	// barrier proves nothing, and the margin by which a holder counts as alive.
	clockTolerance = 2 * time.Second
	renewEvery     = 500 * time.Millisecond
	// barrierSpacing bounds what a flood of strangers can cost: at most 100
	// barriers a second, shared by everyone who waits.
	barrierSpacing = 10 * time.Millisecond
	// barrierPatience is how long a barrier may be unproven before another one
	// is begun on demand.
	barrierPatience = 250 * time.Millisecond
)

// ViewConfig configures a View. Instance, Service and Node are single subject
// tokens.
type ViewConfig struct {
	Conn    *nats.Conn
	Service string        // authcallout, membership, unibusctl
	Node    string        // n1; the node this process serves
	Lease   time.Duration // 0: a reader that decides only right behind a barrier and holds no lease
	Log     *slog.Logger  // nil: discard
	Now     func() time.Time
	OnLease func(bool) // called when the lease is gained or lost; may be nil
	// OnChange, if not nil, is told of each change after the View answers with
	// it and before it is acknowledged; the acknowledgement is withheld until
	// done has been called, from any goroutine, and tells the writer its word. Changes of one bucket come in
	// order, those of different buckets at once. After a reload it is told of
	// every key that differs; the first load is no change. It must not block:
	// the feed waits.
	OnChange func(c Change, done func(Enforced))

	// EncryptionKeys keeps the encryption keys of users, 1.3 KiB each. A Store
	// needs them, because it writes records back whole; a callout does not.
	EncryptionKeys bool

	// Raw keeps every record also as it is stored, which a backup and a
	// restore need: what a View cannot read must not vanish from either.
	Raw bool
}

// Change is one record that a View has applied.
type Change struct {
	Bucket   string
	Key      string
	Revision uint64
	User     bus.UserKey // the user concerned; the zero key for a room, which concerns all its members
	Room     bus.RoomID
}

// View is a current copy of users, rooms and members, together with the proof
// of how current it is. It is safe for concurrent use. Run feeds it.
type View struct {
	cfg  ViewConfig
	boot string
	log  *slog.Logger
	js   jetstream.JetStream

	mu     sync.RWMutex
	tables [3]*table               // by streamIndex
	access map[bus.UserKey]*Access // derived, dropped when anything beneath changes
	fault  string                  // why there is no lease, for people
	live   [3]bool                 // by streamIndex: loaded, and following
	woken  chan struct{}           // closed and replaced whenever anything moves that somebody may wait for
	known  map[string]*holder      // every boot whose barrier was seen in any stream

	barriers barrierState
	holds    holdState
}

// streamIndex numbers the three streams that a barrier spans.
const (
	usersIdx = iota
	roomsIdx
	membersIdx
)

var viewBuckets = [3]string{Users, Rooms, Members}

// table is what one stream says. records holds decoded values only; a record
// that could not be decoded is in broken, so that it denies its own key.
type table struct {
	created  time.Time
	users    map[bus.UserKey]userEntry
	rooms    map[bus.RoomID]roomEntry
	members  map[bus.UserKey]map[bus.RoomID]memberEntry
	byRoom   map[bus.RoomID]map[bus.UserKey]struct{}
	newestOf map[string]uint64 // user hex -> sequence of their newest membership record, readable or not
	broken   map[string]Broken
	lastKey  uint64 // sequence of the last record that is not a barrier
	lastSeq  uint64
	lastTime time.Time

	withoutKeys bool // encryption keys are not kept

	raw    map[string]StoredRecord // of a View with Raw; deleted ones too
	newest uint64                  // sequence of the newest record, barriers apart
}

type userEntry struct {
	user bus.User
	rev  uint64
}

type roomEntry struct {
	room bus.Room
	rev  uint64
	at   int64 // stream time in milliseconds
}

// ended is when a room that is no more active ended, in milliseconds.
func (r roomEntry) ended() int64 {
	if r.room.ArchivedAt != nil {
		return r.room.ArchivedAt.UnixMilli()
	}
	return r.at
}

type memberEntry struct {
	m   bus.Membership
	rev uint64
	at  int64 // stream time in milliseconds
}

// Broken is a record that could not be decoded. It denies its own key.
type Broken struct {
	Bucket   string
	Key      string
	Revision uint64
	Err      error
}

func newTable(created time.Time) *table {
	return &table{
		created:  created,
		users:    map[bus.UserKey]userEntry{},
		rooms:    map[bus.RoomID]roomEntry{},
		members:  map[bus.UserKey]map[bus.RoomID]memberEntry{},
		byRoom:   map[bus.RoomID]map[bus.UserKey]struct{}{},
		newestOf: map[string]uint64{},
		broken:   map[string]Broken{},
	}
}

const faultLoading = "the streams have not answered yet"

// NewView prepares a View; it holds nothing until Run.
func NewView(cfg ViewConfig) (*View, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if skew := guard.ClockSkew(); skew != 0 {
		real := cfg.Now
		cfg.Now = func() time.Time { return real().Add(skew) }
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Lease != 0 && (cfg.Lease < MinLease || cfg.Lease > DefaultLease) {
		return nil, bus.E(bus.Invalid, "a lease is 1s to 10s, not %s", cfg.Lease)
	}
	for _, token := range []string{cfg.Service, cfg.Node} {
		if !instanceToken.MatchString(token) {
			return nil, bus.E(bus.Invalid, "%q cannot name an instance: use a-z A-Z 0-9 _ -", token)
		}
	}
	js, err := newJetStream(cfg.Conn)
	if err != nil {
		return nil, err
	}
	id := make([]byte, 8)
	if _, err := rand.Read(id); err != nil {
		return nil, bus.E(bus.Internal, "randomness: %w", err)
	}
	v := &View{
		cfg: cfg, boot: hex.EncodeToString(id), log: cfg.Log, js: js,
		access: map[bus.UserKey]*Access{}, woken: make(chan struct{}),
		known: map[string]*holder{}, fault: faultLoading,
	}
	for i := range v.tables {
		v.tables[i] = newTable(time.Time{})
	}
	v.barriers.init()
	v.holds.init()
	return v, nil
}

var instanceToken = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// Instance is the name under which this View writes barriers and
// acknowledgements: <service>-<node>.
func (v *View) Instance() string { return v.cfg.Service + "-" + v.cfg.Node }

// Access is everything that decides about one user, as one immutable value:
// two calls return the same pointer while nothing beneath it has changed.
type Access struct {
	User     bus.User
	Revision uint64
	Rooms    []Grant // active rooms in which the user is present, sorted by id
}

// Grant is one room of an Access.
type Grant struct {
	Room      bus.RoomID
	Role      bus.RoomRole
	Durable   bool
	Encrypted bool
}

// Access returns what the View holds about a user. A nil Access with a nil
// error means that no record exists; an error means that the record exists and
// cannot be understood. Neither may be treated as admission.
func (v *View) Access(k bus.UserKey) (*Access, error) {
	v.mu.RLock()
	a := v.access[k]
	v.mu.RUnlock()
	if a != nil {
		return a, nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if b, ok := v.tables[usersIdx].broken[k.Hex()]; ok {
		return nil, bus.E(bus.Internal, "record of user %s cannot be read: %w", k, b.Err)
	}
	e, ok := v.tables[usersIdx].users[k]
	if !ok {
		return nil, nil
	}
	a = &Access{User: e.user, Revision: e.rev, Rooms: v.grants(k)}
	v.access[k] = a
	return a, nil
}

// grants needs mu.
func (v *View) grants(k bus.UserKey) []Grant {
	memberships := v.tables[membersIdx].members[k]
	grants := make([]Grant, 0, len(memberships))
	for id, m := range memberships {
		r, ok := v.tables[roomsIdx].rooms[id]
		if !ok || r.room.Status != bus.RoomActive || m.m.Status != bus.Present {
			continue
		}
		grants = append(grants, Grant{Room: id, Role: m.m.Role, Durable: r.room.Durable, Encrypted: r.room.Encrypted})
	}
	slices.SortFunc(grants, func(a, b Grant) int { return cmp.Compare(a.Room, b.Room) })
	return grants
}

// NarrowedSince reports whether a membership, or the end of a room, may have
// taken something from a user after that moment: what a session that began then
// must not go on with. It errs on the side of yes. Whether the user may be
// there at all is Access' to say.
func (v *View) NarrowedSince(k bus.UserKey, since time.Time) bool {
	v.mu.RLock()
	defer v.mu.RUnlock()
	after := since.UnixMilli()
	for id, m := range v.tables[membersIdx].members[k] {
		r, ok := v.tables[roomsIdx].rooms[id]
		switch {
		case m.m.Status != bus.Present && (m.m.RemovedAt == nil || m.m.RemovedAt.UnixMilli() > after):
			return true
		case m.m.Status == bus.Present && m.at > after && !m.m.Role.MayPublish():
			return true // was a writer before, for all that is known
		case ok && r.room.Status != bus.RoomActive && r.ended() > after:
			return true
		}
	}
	for key := range v.tables[membersIdx].broken {
		if strings.HasSuffix(key, "."+k.Hex()) {
			return true
		}
	}
	return false
}

// Complete reports whether all three tables are loaded and followed. What they
// say was once true together; that it still is, a lease says.
func (v *View) Complete() bool {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.allLive()
}

// Holders lists the boots that hold a lease now, as far as this View knows,
// sorted by instance.
func (v *View) Holders() []Holder {
	v.mu.RLock()
	defer v.mu.RUnlock()
	var out []Holder
	for _, h := range v.known {
		if h.leasedAt(v.cfg.Now()) {
			out = append(out, h.public())
		}
	}
	sortHolders(out)
	return out
}

// UserByHandle finds a user by what their own record says.
// UserByHandle finds a user by what their own record says. While a rotation is
// under way, and after it, two keys carry one handle: then it is the one that
// has not handed it over.
func (v *View) UserByHandle(h bus.Handle) (bus.User, uint64, bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	var best userEntry
	for _, e := range v.tables[usersIdx].users {
		if e.user.Handle == h && (best.rev == 0 || standing(e.user) > standing(best.user)) {
			best = e
		}
	}
	return best.user, best.rev, best.rev != 0
}

// standing orders users of one handle: who has handed it over, who is about to
// get it, who has it.
func standing(u bus.User) int {
	switch {
	case u.RotatedTo != nil:
		return 0
	case u.Becomes != "":
		return 1
	}
	return 2
}

// User returns one user's record and revision.
func (v *View) User(k bus.UserKey) (bus.User, uint64, bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	e, ok := v.tables[usersIdx].users[k]
	return e.user, e.rev, ok
}

// UserRevision is a user with the revision of their record.
type UserRevision struct {
	bus.User
	Revision uint64 `json:"revision"`
}

// Users returns all users, sorted by handle.
func (v *View) Users() []UserRevision {
	v.mu.RLock()
	defer v.mu.RUnlock()
	out := make([]UserRevision, 0, len(v.tables[usersIdx].users))
	for _, e := range v.tables[usersIdx].users {
		out = append(out, UserRevision{e.user, e.rev})
	}
	slices.SortFunc(out, func(a, b UserRevision) int { return cmp.Compare(a.Handle, b.Handle) })
	return out
}

// Room returns one room's record and revision.
func (v *View) Room(id bus.RoomID) (bus.Room, uint64, bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	e, ok := v.tables[roomsIdx].rooms[id]
	return e.room, e.rev, ok
}

// RoomRevision is a room with the revision of its record.
type RoomRevision struct {
	bus.Room
	Revision uint64 `json:"revision"`
}

// Rooms returns all rooms, sorted by id.
func (v *View) Rooms() []RoomRevision {
	v.mu.RLock()
	defer v.mu.RUnlock()
	out := make([]RoomRevision, 0, len(v.tables[roomsIdx].rooms))
	for _, e := range v.tables[roomsIdx].rooms {
		out = append(out, RoomRevision{e.room, e.rev})
	}
	slices.SortFunc(out, func(a, b RoomRevision) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// DurableRooms returns the records of all durable rooms, active or not, in no
// order: among thousands of others they may be few, and whoever records them
// looks often.
func (v *View) DurableRooms() (out []bus.Room) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	for _, e := range v.tables[roomsIdx].rooms {
		if e.room.Durable {
			out = append(out, e.room)
		}
	}
	return out
}

// MembershipRevision is a membership with the revision of its record.
type MembershipRevision struct {
	bus.Membership
	Revision uint64 `json:"revision"`
}

// Members returns the records of everyone who is or was a member of a room,
// sorted by key.
func (v *View) Members(id bus.RoomID) []MembershipRevision {
	v.mu.RLock()
	defer v.mu.RUnlock()
	t := v.tables[membersIdx]
	out := make([]MembershipRevision, 0, len(t.byRoom[id]))
	for u := range t.byRoom[id] {
		e := t.members[u][id]
		out = append(out, MembershipRevision{e.m, e.rev})
	}
	slices.SortFunc(out, func(a, b MembershipRevision) int { return cmp.Compare(a.User.Hex(), b.User.Hex()) })
	return out
}

// Membership returns one membership record and its revision.
func (v *View) Membership(id bus.RoomID, u bus.UserKey) (bus.Membership, uint64, bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	e, ok := v.tables[membersIdx].members[u][id]
	return e.m, e.rev, ok
}

// MembershipsOf returns the records of every room in which a user is or was,
// sorted by room.
func (v *View) MembershipsOf(k bus.UserKey) []MembershipRevision {
	v.mu.RLock()
	defer v.mu.RUnlock()
	out := make([]MembershipRevision, 0, len(v.tables[membersIdx].members[k]))
	for _, e := range v.tables[membersIdx].members[k] {
		out = append(out, MembershipRevision{e.m, e.rev})
	}
	slices.SortFunc(out, func(a, b MembershipRevision) int { return cmp.Compare(a.Room, b.Room) })
	return out
}

// Memberships returns every membership record of every user, present or not,
// for the reconciler.
func (v *View) Memberships() []MembershipRevision {
	v.mu.RLock()
	defer v.mu.RUnlock()
	var out []MembershipRevision
	for _, rooms := range v.tables[membersIdx].members {
		for _, e := range rooms {
			out = append(out, MembershipRevision{e.m, e.rev})
		}
	}
	return out
}

// Broken lists the records that cannot be decoded, sorted by bucket and key.
// Each denies its own key and deserves an alert.
func (v *View) Broken() []Broken {
	v.mu.RLock()
	defer v.mu.RUnlock()
	var out []Broken
	for _, t := range v.tables {
		for _, b := range t.broken {
			out = append(out, b)
		}
	}
	slices.SortFunc(out, func(a, b Broken) int {
		return cmp.Or(cmp.Compare(a.Bucket, b.Bucket), cmp.Compare(a.Key, b.Key))
	})
	return out
}

// UserRecords counts the records of users, readable or not; barriers are no
// records.
func (v *View) UserRecords() int {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return len(v.tables[usersIdx].users) + len(v.tables[usersIdx].broken)
}

// revisionAnyUser is the sequence of the newest user record: the expectation of
// a write that must see every other one (see anyUser).
func (v *View) revisionAnyUser() uint64 {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.tables[usersIdx].lastKey
}

// WaitLease blocks until the View holds a lease or ctx ends.
func (v *View) WaitLease(ctx context.Context) error {
	return v.waitUntil(ctx, func() bool { _, ok := v.leaseLocked(); return ok })
}

// waitUntil blocks until cond, called with mu held, is true.
func (v *View) waitUntil(ctx context.Context, cond func() bool) error {
	for {
		v.mu.Lock()
		ok, woken, fault := cond(), v.woken, v.fault
		v.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-woken:
		case <-ctx.Done():
			if fault == "" {
				fault = "no answer in time"
			}
			return bus.E(bus.Unavailable, "no quorum: %s", fault).
				WithHint("unibusctl cluster status")
		}
	}
}

// wake needs mu.
func (v *View) wake() {
	close(v.woken)
	v.woken = make(chan struct{})
}
