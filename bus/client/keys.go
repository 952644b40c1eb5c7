package client

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"io"
	"log/slog"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"unibus.internal/bus"
	"unibus.internal/bus/guard"
	"unibus.internal/bus/seal"
)

const (
	// keysFresh is how long a sender goes on without asking whether there is a
	// newer epoch; keysStale, how long if nobody answers.
	keysFresh = 30 * time.Second
	keysStale = 5 * time.Minute
	// Messages under unknown epochs make a client ask: so many times at once, and
	// then once in so long. Who sends such messages must not make every member ask
	// for each.
	askBurst = 8
	askAgain = time.Second
	// oldEpochGrace is for messages that were under way when an epoch ended.
	oldEpochGrace = time.Minute
	// clockTolerance is how old the first message of a session may be in a room
	// that stores none, by two clocks: an older one is a recording.
	clockTolerance = 5 * time.Minute
	rekeyTries     = 8
	grantPage      = 32 // envelopes of one request
)

// KeysConfig configures Keys.
type KeysConfig struct {
	API      *Client
	Identity seal.Identity // that of API
	Trust    TrustStore    // what to remember; see FileTrust

	// OnAlert is told what is wrong with what the servers or a member say, and
	// what is missing. It may be called from any goroutine; nil: the log only.
	OnAlert func(Alert)
	Log     *slog.Logger     // nil: silent
	Now     func() time.Time // nil: time.Now
	Rand    io.Reader        // nil: crypto/rand; safe for concurrent use
}

// Alert is something a person should know: what was refused, or is missing.
type Alert struct {
	Room bus.RoomID
	User bus.UserKey // zero: nobody in particular
	Err  error
}

// Keys holds a user's keys of encrypted rooms, and decides what of the servers'
// word to believe: nothing that is not signed by who has to sign it, and nothing
// that contradicts what was seen before (docs/encryption.md; ADR 0031). It is
// safe for concurrent use.
//
// Forbidden is the code of every refusal to believe. It names what was tried and
// does not go away by asking again.
type Keys struct {
	cfg KeysConfig

	mu       sync.Mutex
	rooms    map[bus.RoomID]*roomKeys
	privates map[uint64]*seal.PrivateKey
}

// NewKeys prepares Keys and asks nobody yet.
func NewKeys(cfg KeysConfig) (*Keys, error) {
	if cfg.API == nil || cfg.Identity == nil || cfg.Trust == nil {
		return nil, bus.E(bus.Invalid, "keys need an API, an identity and a store of what is trusted")
	}
	if cfg.API.Key() != cfg.Identity.Key() {
		return nil, bus.E(bus.Invalid, "keys need the API of their own identity")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.Reader
	}
	return &Keys{cfg: cfg, rooms: map[bus.RoomID]*roomKeys{}, privates: map[uint64]*seal.PrivateKey{}}, nil
}

func (k *Keys) alert(room bus.RoomID, user bus.UserKey, err error) {
	k.cfg.Log.Warn("encrypted room", "room", room, "user", user, "err", err)
	if k.cfg.OnAlert != nil {
		k.cfg.OnAlert(Alert{room, user, err})
	}
}

func (k *Keys) private(n uint64) (*seal.PrivateKey, error) {
	k.mu.Lock()
	p := k.privates[n]
	k.mu.Unlock()
	if p != nil {
		return p, nil
	}
	p, err := seal.NewPrivateKey(k.cfg.Identity, n)
	if err == nil && n <= 1024 { // whoever writes numbers into envelopes must not fill the memory
		k.mu.Lock()
		k.privates[n] = p
		k.mu.Unlock()
	}
	return p, err
}

// Announce publishes the user's encryption key if the servers have none, and
// returns it. Forbidden: they have one that is not derived from this identity.
func (k *Keys) Announce(ctx context.Context) (bus.EncryptionKey, error) {
	me, err := k.cfg.API.Me(ctx)
	if err != nil {
		return bus.EncryptionKey{}, err
	}
	if has := me.EncryptionKey; has != nil {
		p, err := k.private(has.N)
		if err != nil {
			return bus.EncryptionKey{}, err
		}
		if _, hash := p.Public(); hash != seal.HashOf(has.Public) {
			err := bus.E(bus.Forbidden, "the servers have encryption key %d for us, and it is not ours", has.N)
			k.alert("", k.cfg.Identity.Key(), err)
			return bus.EncryptionKey{}, err
		}
		return *has, k.pinKeys([]bus.MemberKey{{SignPub: k.cfg.Identity.Key(), EncryptionKey: has}})
	}
	n := uint64(1)
	if err := k.cfg.Trust.Update(func(t *Trust) error {
		n = max(n, t.Users[k.cfg.Identity.Key()].N)
		return nil
	}); err != nil {
		return bus.EncryptionKey{}, err
	}
	return k.publish(ctx, n)
}

// Renew publishes the user's next encryption key. Owners give it the keys of
// their rooms with the next epoch; what was sealed to the one before still
// opens.
func (k *Keys) Renew(ctx context.Context) (bus.EncryptionKey, error) {
	has, err := k.Announce(ctx)
	if err != nil {
		return bus.EncryptionKey{}, err
	}
	return k.publish(ctx, has.N+1)
}

func (k *Keys) publish(ctx context.Context, n uint64) (bus.EncryptionKey, error) {
	p, err := k.private(n)
	if err != nil {
		return bus.EncryptionKey{}, err
	}
	bound, err := p.Bind(k.cfg.Identity, k.cfg.Now())
	if err != nil {
		return bus.EncryptionKey{}, err
	}
	if _, err := k.cfg.API.SetEncryptionKey(ctx, bound); err != nil {
		return bus.EncryptionKey{}, err
	}
	return bound, k.pinKeys([]bus.MemberKey{{SignPub: k.cfg.Identity.Key(), EncryptionKey: &bound}})
}

// pinKeys holds encryption keys against what is known, and remembers them.
func (k *Keys) pinKeys(members []bus.MemberKey) error {
	return k.cfg.Trust.Update(func(t *Trust) error {
		for _, m := range members {
			if err := t.encryptionKey(m.SignPub, m.EncryptionKey, k.cfg.Now()); err != nil {
				return err
			}
		}
		return nil
	})
}

// Resolve is the key of a user who is named by key or by handle. What a handle
// means is pinned when it is first asked for: Forbidden if it means another key
// now.
func (k *Keys) Resolve(ctx context.Context, name string) (bus.UserKey, error) {
	if key, err := bus.ParseUserKey(name); err == nil {
		return key, nil
	}
	u, err := k.cfg.API.User(ctx, name)
	if err != nil {
		return bus.UserKey{}, err
	}
	err = k.cfg.Trust.Update(func(t *Trust) error { return t.handle(bus.Handle(name), u.SignPub) })
	if err != nil {
		k.alert("", u.SignPub, err)
		return bus.UserKey{}, err
	}
	return u.SignPub, nil
}

// UserNumber is what two users compare to know that each has the other's key.
type UserNumber struct {
	User     bus.UserKey  `json:"sign_pub"`
	NKey     string       `json:"nkey"`
	Number   string       `json:"number"`
	Was      *bus.UserKey `json:"was"`      // the key that this name meant before, if it was another
	Verified *time.Time   `json:"verified"` // when the numbers were compared; null: never
	Admin    bool         `json:"admin"`    // trusted to appoint owners
}

// Number is the number to compare with a user, who may be named by a handle
// that meant somebody else before.
func (k *Keys) Number(ctx context.Context, name string) (UserNumber, error) {
	key, err := bus.ParseUserKey(name)
	if err != nil {
		u, err := k.cfg.API.User(ctx, name)
		if err != nil {
			return UserNumber{}, err
		}
		key = u.SignPub
	}
	out := UserNumber{User: key, NKey: key.NKey(), Number: seal.UserNumber(k.cfg.Identity.Key(), key)}
	err = k.cfg.Trust.Update(func(t *Trust) error {
		if was, ok := t.Handles[bus.Handle(name)]; ok && was != key {
			out.Was = &was
		}
		out.Verified = t.Users[key].Verified
		_, out.Admin = t.Admins[key]
		return nil
	})
	return out, err
}

// Confirm records that the numbers were compared and are the same; from now on
// the name means this key. admin trusts them to appoint owners, too.
func (k *Keys) Confirm(name string, user bus.UserKey, admin bool) error {
	now := k.cfg.Now().UTC().Truncate(time.Second)
	return k.cfg.Trust.Update(func(t *Trust) error {
		u := t.Users[user]
		u.Verified, u.Seen = &now, cmp.Or(u.Seen, now)
		t.Users[user] = u
		if h, err := bus.ParseHandle(name); err == nil {
			t.Handles[h] = user
		}
		if admin {
			t.Admins[user] = TrustedAdmin{Seen: now}
		}
		return nil
	})
}

// TrustAdmin pins an admin whose appointments of owners are to be accepted.
func (k *Keys) TrustAdmin(admin bus.UserKey) error {
	return k.cfg.Trust.Update(func(t *Trust) error {
		if _, known := t.Admins[admin]; !known {
			t.Admins[admin] = TrustedAdmin{Seen: k.cfg.Now().UTC().Truncate(time.Second)}
		}
		return nil
	})
}

// ConfirmRoom records that the room's number was compared and is the same.
func (k *Keys) ConfirmRoom(s RoomStanding) error {
	now := k.cfg.Now().UTC().Truncate(time.Second)
	return k.cfg.Trust.Update(func(t *Trust) error {
		r := t.Rooms[s.Room]
		if r.Epoch != s.Epoch || r.Roster != s.Roster {
			return bus.E(bus.Conflict, "room %s has another epoch by now: compare again", s.Room)
		}
		r.Verified = &now
		t.Rooms[s.Room] = r
		return nil
	})
}

// RoomStanding is what is known of an encrypted room. All but Why and Waiting,
// which are the servers' word, is verified.
type RoomStanding struct {
	Room          bus.RoomID          `json:"room"`
	Epoch         uint64              `json:"epoch"` // 0: the room has no key yet
	Roster        seal.Hash           `json:"roster"`
	Number        string              `json:"number"`   // to compare with other members; empty without an epoch
	Verified      *time.Time          `json:"verified"` // when the numbers were compared, in this epoch or before; null: never
	Signer        *bus.UserKey        `json:"signer"`
	Members       int                 `json:"members"` // in the roster
	HasKey        bool                `json:"has_key"` // we can read and write
	Owner         bool                `json:"owner"`   // by the roster; before the first, by who made the room
	RekeyRequired bool                `json:"rekey_required"`
	Why           []bus.RekeyReason   `json:"why"`
	Waiting       []bus.WaitingMember `json:"waiting"`
}

// Room asks for the keys of a room, and verifies them.
func (k *Keys) Room(ctx context.Context, id bus.RoomID) (RoomStanding, error) {
	r := k.of(id)
	if err := r.enter(ctx); err != nil {
		return RoomStanding{}, err
	}
	defer r.leave()
	if err := r.refresh(ctx); err != nil {
		return RoomStanding{}, err
	}
	return r.standing()
}

// of is the one roomKeys of a room.
func (k *Keys) of(id bus.RoomID) *roomKeys {
	k.mu.Lock()
	defer k.mu.Unlock()
	r := k.rooms[id]
	if r == nil {
		r = &roomKeys{keys: k, id: id, turn: make(chan struct{}, 1), secrets: map[uint64]seal.Key{}}
		k.rooms[id] = r
	}
	return r
}

// roomKeys is what is believed of one room. turn is held by who reads or changes
// it, also while they ask the servers: nobody decides on half an answer.
type roomKeys struct {
	keys *Keys
	id   bus.RoomID
	turn chan struct{}

	chain   []*seal.Roster      // verified; that of epoch 1 first
	secrets map[uint64]seal.Key // by epoch, those we were given
	answer  bus.RoomKeys        // the servers' newest word, without epochs
	checked time.Time           // when it was last brought up to date
	asks    float64             // how often it may be asked now
	askedAt time.Time
	moved   time.Time // when the newest epoch was first seen
	sender  *seal.Sender
}

func (r *roomKeys) enter(ctx context.Context) error {
	select {
	case r.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return bus.E(bus.Unavailable, "the keys of room %s are still being asked for: %w", r.id, ctx.Err())
	}
}

func (r *roomKeys) leave() { <-r.turn }

func (r *roomKeys) newest() *seal.Roster {
	if len(r.chain) == 0 {
		return nil
	}
	return r.chain[len(r.chain)-1]
}

func (r *roomKeys) standing() (RoomStanding, error) {
	s := RoomStanding{Room: r.id, RekeyRequired: r.answer.RekeyRequired, Why: r.answer.Why, Waiting: r.answer.Waiting, Owner: r.answer.Creator == r.keys.cfg.Identity.Key()}
	n := r.newest()
	if n == nil {
		return s, nil
	}
	_, s.HasKey = r.secrets[n.Epoch]
	s.Epoch, s.Roster, s.Number, s.Members, s.Signer = n.Epoch, n.Hash(), seal.RoomNumber(n), len(n.Members), &n.Signer
	s.Owner = n.IsOwner(r.keys.cfg.Identity.Key())
	err := r.keys.cfg.Trust.Update(func(t *Trust) error { s.Verified = t.Rooms[r.id].Verified; return nil })
	return s, err
}

// refresh brings everything up to date, and looks again for the keys that we
// should have and have not.
func (r *roomKeys) refresh(ctx context.Context) error {
	after := uint64(len(r.chain))
	if n := r.newest(); n != nil {
		if _, ok := r.secrets[n.Epoch]; !ok {
			after--
		}
	}
	return r.refreshAfter(ctx, after)
}

// refreshAfter asks for the epochs behind after, verifies them, and takes them
// over if all is well: else nothing has changed, and the error says what was
// tried.
func (r *roomKeys) refreshAfter(ctx context.Context, after uint64) (err error) {
	now := r.keys.cfg.Now()
	chain, envelopes := slices.Clone(r.chain), map[uint64][]byte{}
	var answer bus.RoomKeys
	for {
		if answer, err = r.keys.cfg.API.RoomKeys(ctx, r.id, after); err != nil {
			return err
		}
		for _, e := range answer.Epochs {
			if chain, err = r.believe(chain, answer.Creator, e); err != nil {
				return r.alarmed(err)
			}
			envelopes[e.Epoch] = e.Envelope
		}
		if answer.Next <= after || len(answer.Epochs) == 0 { // the end, or pages without one
			break
		}
		after = answer.Next
	}
	if uint64(len(chain)) != answer.Epoch {
		return r.alarmed(bus.E(bus.Forbidden, "the servers say that room %s has %d epochs, and there are %d: they show an old state, or none", r.id, answer.Epoch, len(chain)))
	}
	if err := r.pin(chain, now); err != nil {
		return r.alarmed(err)
	}
	if len(chain) > len(r.chain) {
		r.moved = now
	}
	answer.Epochs = nil
	r.chain, r.answer, r.checked = chain, answer, now
	for _, epoch := range slices.Sorted(maps.Keys(envelopes)) {
		if _, known := r.secrets[epoch]; known || envelopes[epoch] == nil {
			continue
		}
		if err := r.unseal(epoch, envelopes[epoch]); err != nil {
			r.keys.alert(r.id, bus.UserKey{}, err) // and go on without this key
		}
	}
	return nil
}

func (r *roomKeys) alarmed(err error) error {
	r.keys.alert(r.id, bus.UserKey{}, err)
	return err
}

// believe appends the next roster to a chain, or refuses it.
func (r *roomKeys) believe(chain []*seal.Roster, creator bus.UserKey, e bus.RoomEpoch) ([]*seal.Roster, error) {
	roster, err := seal.ParseRoster(e.Roster)
	if err != nil {
		return nil, bus.E(bus.Forbidden, "the servers show a roster of room %s that is none: %w", r.id, err)
	}
	if roster.Epoch != e.Epoch {
		return nil, bus.E(bus.Forbidden, "the servers show the roster of epoch %d of room %s as that of epoch %d", roster.Epoch, r.id, e.Epoch)
	}
	if known := uint64(len(chain)); e.Epoch >= 1 && e.Epoch <= known {
		if roster.Room != r.id || roster.Hash() != chain[e.Epoch-1].Hash() {
			return nil, bus.E(bus.Forbidden, "the servers show another roster of room %s, epoch %d, than before", r.id, e.Epoch)
		}
		return chain, nil
	}
	var before *seal.Roster
	if len(chain) > 0 {
		before = chain[len(chain)-1]
	}
	var admins map[bus.UserKey]TrustedAdmin
	if roster.Appointed != nil {
		if err := r.keys.cfg.Trust.Update(func(t *Trust) error { admins = t.Admins; return nil }); err != nil {
			return nil, err
		}
	}
	trusted := func(k bus.UserKey) bool { _, ok := admins[k]; return ok }
	if err := roster.Follows(before, r.id, creator, trusted); err != nil {
		return nil, err
	}
	return append(chain, roster), nil
}

// pin holds a chain against what is remembered of the room, and remembers it.
func (r *roomKeys) pin(chain []*seal.Roster, now time.Time) error {
	return r.keys.cfg.Trust.Update(func(t *Trust) error {
		was, known := t.Rooms[r.id]
		if known && !guard.Off(guard.RoomPin) {
			if uint64(len(chain)) < was.Epoch {
				return bus.E(bus.Forbidden, "the servers show epoch %d of room %s; there was an epoch %d: they show an old state", len(chain), r.id, was.Epoch)
			}
			if chain[was.Epoch-1].Hash() != was.Roster {
				return bus.E(bus.Forbidden, "the servers show another epoch %d of room %s than before: the room's history was changed", was.Epoch, r.id)
			}
		}
		if len(chain) == 0 {
			return nil
		}
		newest := chain[len(chain)-1]
		if known && was.Epoch == newest.Epoch {
			return nil
		}
		t.Rooms[r.id] = TrustedRoom{Epoch: newest.Epoch, Roster: newest.Hash(), Seen: now.UTC().Truncate(time.Second), Verified: was.Verified}
		return nil
	})
}

func (r *roomKeys) unseal(epoch uint64, envelope []byte) error {
	n, err := seal.EnvelopeN(envelope)
	if err != nil {
		return err
	}
	p, err := r.keys.private(n)
	if err != nil {
		return err
	}
	key, err := seal.OpenEnvelope(envelope, p, r.chain[epoch-1], r.newest())
	if err != nil {
		return err
	}
	r.secrets[epoch] = key
	return nil
}

// current is what to send under. It refuses when the newest roster is not the
// one of our newest key: under an older one, somebody who was removed might
// read.
func (r *roomKeys) current(ctx context.Context) (seal.Epoch, error) {
	now := r.keys.cfg.Now()
	if now.Sub(r.checked) > keysFresh {
		err := r.refresh(ctx)
		if bus.CodeOf(err) != bus.Unavailable || now.Sub(r.checked) > keysStale {
			if err != nil {
				return seal.Epoch{}, err
			}
		}
	}
	n := r.newest()
	if n == nil {
		return seal.Epoch{}, bus.E(bus.Conflict, "room %s has no key yet: who made it makes one", r.id).WithHint("unibusctl room rekey %s", r.id)
	}
	key, ok := r.secrets[n.Epoch]
	if !ok && r.mayAsk() {
		if err := r.refresh(ctx); err != nil {
			return seal.Epoch{}, err
		}
		n = r.newest()
		key, ok = r.secrets[n.Epoch]
	}
	if !ok {
		return seal.Epoch{}, r.noKey(n)
	}
	return seal.Epoch{Roster: n, Key: key}, nil
}

func (r *roomKeys) noKey(n *seal.Roster) error {
	if _, in := n.Member(r.keys.cfg.Identity.Key()); !in {
		return bus.E(bus.Forbidden, "no owner of room %s has admitted us to epoch %d yet", r.id, n.Epoch).
			WithHint("an owner runs: unibusctl room rekey %s --admit %s", r.id, r.keys.cfg.Identity.Key().NKey())
	}
	return bus.E(bus.Unavailable, "our key of epoch %d of room %s is not there yet", n.Epoch, r.id)
}

// seal encrypts a message.
func (r *roomKeys) seal(ctx context.Context, topic string, payload []byte) ([]byte, error) {
	if err := r.enter(ctx); err != nil {
		return nil, err
	}
	defer r.leave()
	e, err := r.current(ctx)
	if err != nil {
		return nil, err
	}
	if r.sender == nil {
		if r.sender, err = seal.NewSender(r.keys.cfg.Identity, r.keys.cfg.Rand, r.keys.cfg.Now); err != nil {
			return nil, err
		}
	}
	return r.sender.Seal(e, topic, payload)
}

// file prepares to encrypt a file.
func (k *Keys) file(ctx context.Context, id bus.RoomID, name bus.BlobName) (*seal.File, error) {
	r := k.of(id)
	if err := r.enter(ctx); err != nil {
		return nil, err
	}
	defer r.leave()
	e, err := r.current(ctx)
	if err != nil {
		return nil, err
	}
	return seal.NewFile(e, k.cfg.Identity, name, k.cfg.Rand, k.cfg.Now())
}

// opener decrypts a file into w.
func (k *Keys) opener(ctx context.Context, id bus.RoomID, name bus.BlobName, w io.Writer) *seal.Opener {
	r := k.of(id)
	return seal.NewOpener(name, w, func(epoch uint64) (seal.Epoch, error) {
		if err := r.enter(ctx); err != nil {
			return seal.Epoch{}, err
		}
		defer r.leave()
		return r.epoch(ctx, epoch)
	})
}

// encrypted says whether a room is: as the servers say, and never against what is
// remembered of it. Who could tell a sender otherwise would have them send in the
// clear. Without keys, k is nil, there is nothing to remember.
func (k *Keys) encrypted(id bus.RoomID, said bool) (bool, error) {
	if said || k == nil || guard.Off(guard.RoomPin) {
		return said, nil
	}
	known := false
	err := k.cfg.Trust.Update(func(t *Trust) error { _, known = t.Rooms[id]; return nil })
	if err == nil && known {
		err = bus.E(bus.Forbidden, "the servers say that room %s is not encrypted, and it is", id)
		k.alert(id, bus.UserKey{}, err)
	}
	return false, err
}

// epoch is what a message says to be under. Our key may have come after it.
func (r *roomKeys) epoch(ctx context.Context, epoch uint64) (seal.Epoch, error) {
	key, ok := r.secrets[epoch]
	if !ok && epoch >= 1 && r.mayAsk() {
		if err := r.refreshAfter(ctx, min(uint64(len(r.chain)), epoch-1)); err != nil {
			return seal.Epoch{}, err
		}
		key, ok = r.secrets[epoch]
	}
	if !ok {
		return seal.Epoch{}, bus.E(bus.Forbidden, "a message of room %s is under epoch %d, of which we have no key", r.id, epoch)
	}
	return seal.Epoch{Roster: r.chain[epoch-1], Key: key}, nil
}

// mayAsk bounds the questions that others can cause.
func (r *roomKeys) mayAsk() bool {
	now := r.keys.cfg.Now()
	if r.askedAt.IsZero() {
		r.asks = askBurst
	}
	r.asks = min(askBurst, r.asks+float64(now.Sub(r.askedAt))/float64(askAgain))
	r.askedAt = now
	if r.asks < 1 {
		return false
	}
	r.asks--
	return true
}

// toSend and toRead are what to encrypt and decrypt with something that is no
// message: the newest epoch, and one that was named.
func (r *roomKeys) toSend(ctx context.Context) (seal.Epoch, error) {
	if err := r.enter(ctx); err != nil {
		return seal.Epoch{}, err
	}
	defer r.leave()
	return r.current(ctx)
}

func (r *roomKeys) toRead(ctx context.Context, epoch uint64) (seal.Epoch, error) {
	if err := r.enter(ctx); err != nil {
		return seal.Epoch{}, err
	}
	defer r.leave()
	return r.epoch(ctx, epoch)
}

// listener opens what one subscription hears, or one reading of what is stored.
type listener struct {
	keys    *roomKeys
	tracker *seal.Tracker
	live    bool // the room stores nothing: what comes was sent just now
	partial bool // it is given some messages only, so nothing is missing
}

func (r *roomKeys) listen(live bool) *listener {
	return &listener{keys: r, tracker: seal.NewTracker(), live: live}
}

// open decrypts a message, and refuses one that came before. What is missing or
// late is told to OnAlert.
func (l *listener) open(ctx context.Context, sender bus.UserKey, topic string, raw []byte) ([]byte, error) {
	m, err := l.decrypt(ctx, sender, topic, raw)
	if err == nil {
		err = l.timely(sender, m)
	}
	var order seal.Order
	if err == nil {
		order, err = l.tracker.See(sender, m)
	}
	k := l.keys.keys
	if err != nil {
		if bus.CodeOf(err) != bus.Unavailable { // else it is not known yet whether there is anything to say
			k.alert(l.keys.id, sender, err)
		}
		return nil, err
	}
	switch {
	case order.Missing > 0 && !l.partial:
		k.alert(l.keys.id, sender, bus.E(bus.Unavailable, "%d messages of %s have not come", order.Missing, sender))
	case order.Late:
		k.alert(l.keys.id, sender, bus.E(bus.Conflict, "message %d of %s has come after a later one", m.Counter, sender))
	}
	return m.Payload, nil
}

func (l *listener) decrypt(ctx context.Context, sender bus.UserKey, topic string, raw []byte) (seal.Message, error) {
	epoch, err := seal.MessageEpoch(raw)
	if err != nil {
		return seal.Message{}, bus.E(bus.Forbidden, "a message in room %s is not encrypted", l.keys.id)
	}
	e, err := l.keys.toRead(ctx, epoch)
	if err != nil {
		return seal.Message{}, err
	}
	return e.Open(sender, topic, raw)
}

// timely refuses, in a room that stores nothing, what can only be a recording,
// or the doing of somebody who was removed.
func (l *listener) timely(sender bus.UserKey, m seal.Message) error {
	if !l.live {
		return nil
	}
	r, now := l.keys, l.keys.keys.cfg.Now()
	r.turn <- struct{}{}
	newest, moved := r.newest(), r.moved
	r.leave()
	if m.Epoch < newest.Epoch && now.Sub(moved) > oldEpochGrace {
		return bus.E(bus.Forbidden, "a message of %s in room %s is under epoch %d, which is over", sender, r.id, m.Epoch)
	}
	if age := now.Sub(m.SentAt); age.Abs() > clockTolerance {
		return bus.E(bus.Forbidden, "a message of %s in room %s says that it was sent %s ago", sender, r.id, age.Round(time.Second)).
			WithHint("compare the clocks of both machines")
	}
	return nil
}

// Admission is somebody whom an owner lets into a room, or raises in it: by key.
type Admission struct {
	User bus.UserKey
	Role bus.RoomRole
}

// RekeyOptions says what the next epoch shall be, beside what it must.
type RekeyOptions struct {
	Admit       []Admission
	Appointment *seal.Appointment // of this user, as owner: see Appoint
	Force       bool              // also if the room needs no other key
}

// Rekeyed is what Rekey did.
type Rekeyed struct {
	Room    bus.RoomID        `json:"room"`
	Epoch   uint64            `json:"epoch"`
	Members int               `json:"members"`
	Changes []seal.Difference `json:"changes"` // against the roster before
	Already bool              `json:"already"` // no other key was needed; nothing was changed
	Number  string            `json:"number"`
}

// Rekey gives a room another key, if it needs one: only an owner can. The roster
// before is the list of who gets it, without those whom the servers do not name
// any more; nobody comes in, or rises, but by RekeyOptions.Admit. If another
// owner is faster, what was made here is discarded, and theirs is taken if it is
// enough.
func (k *Keys) Rekey(ctx context.Context, id bus.RoomID, o RekeyOptions) (Rekeyed, error) {
	r := k.of(id)
	if err := r.enter(ctx); err != nil {
		return Rekeyed{}, err
	}
	defer r.leave()
	for try := 1; ; try++ {
		if err := r.refresh(ctx); err != nil {
			return Rekeyed{}, err
		}
		before := r.newest()
		if before != nil && !r.answer.RekeyRequired && !o.Force && o.Appointment == nil && admitted(before, o.Admit) {
			return Rekeyed{Room: id, Epoch: before.Epoch, Members: len(before.Members), Changes: []seal.Difference{}, Already: true, Number: seal.RoomNumber(before)}, nil
		}
		next, key, envelopes, err := r.nextEpoch(ctx, before, o)
		if err != nil {
			return Rekeyed{}, err
		}
		_, err = k.cfg.API.NewEpoch(ctx, id, next.Bytes(), envelopes)
		if bus.CodeOf(err) == bus.Conflict && try < rekeyTries {
			k.cfg.Log.Info("another epoch was made meanwhile", "room", id, "epoch", next.Epoch, "err", err)
			o.Force = false // theirs is new enough
			continue
		}
		if err != nil {
			return Rekeyed{}, err
		}
		if err := r.refresh(ctx); err != nil {
			return Rekeyed{}, err
		}
		if n := r.newest(); n.Epoch < next.Epoch || r.chain[next.Epoch-1].Hash() != next.Hash() {
			return Rekeyed{}, r.alarmed(bus.E(bus.Forbidden, "the servers took our epoch %d of room %s, and show another", next.Epoch, id))
		}
		r.secrets[next.Epoch] = key
		changes := next.Differences(before)
		if changes == nil {
			changes = []seal.Difference{}
		}
		return Rekeyed{Room: id, Epoch: next.Epoch, Members: len(next.Members), Changes: changes, Number: seal.RoomNumber(next)}, nil
	}
}

func admitted(r *seal.Roster, who []Admission) bool {
	return !slices.ContainsFunc(who, func(a Admission) bool {
		m, _ := r.Member(a.User)
		return m.Role.Rank() < a.Role.Rank()
	})
}

// nextEpoch makes a roster, its key and the envelopes.
func (r *roomKeys) nextEpoch(ctx context.Context, before *seal.Roster, o RekeyOptions) (*seal.Roster, seal.Key, [][]byte, error) {
	none := func(err error) (*seal.Roster, seal.Key, [][]byte, error) { return nil, seal.Key{}, nil, err }
	k := r.keys
	listed, err := k.cfg.API.MemberKeys(ctx, r.id)
	if err != nil {
		return none(err)
	}
	wanted, err := r.whoIsIn(before, listed, o)
	if err != nil {
		return none(err)
	}
	var members []bus.MemberKey
	for _, m := range listed {
		if role, in := wanted[m.SignPub]; in {
			if m.EncryptionKey == nil {
				return none(bus.E(bus.Conflict, "%s has published no encryption key", cmp.Or(string(m.Handle), m.SignPub.NKey())).
					WithHint("they run once: unibusctl room verify %s", r.id))
			}
			m.Role = role
			members = append(members, m)
		}
	}
	if err := k.pinKeys(members); err != nil {
		return none(r.alarmed(err))
	}
	roster := seal.Roster{Room: r.id, Epoch: 1, CreatedAt: k.cfg.Now(), Appointed: o.Appointment}
	if before != nil {
		roster.Epoch, roster.Previous = before.Epoch+1, before.Hash()
	}
	key, err := seal.NewKey(k.cfg.Rand)
	if err != nil {
		return none(err)
	}
	roster.Commitment = key.Commitment(r.id, roster.Epoch)
	public := map[bus.UserKey]bus.EncryptionKey{}
	for _, m := range members {
		roster.Members = append(roster.Members, seal.Member{User: m.SignPub, Role: m.Role, N: m.EncryptionKey.N, Key: seal.HashOf(m.EncryptionKey.Public)})
		public[m.SignPub] = *m.EncryptionKey
	}
	signed, err := roster.Sign(k.cfg.Identity)
	if err != nil {
		return none(err)
	}
	envelopes, err := sealAll(k.cfg.Identity, signed, key, public)
	if err != nil {
		return none(err)
	}
	return signed, key, envelopes, nil
}

// sealAll gives the key to all members, on all processors: it is most of what an
// owner does for a large room, and nothing else goes on meanwhile.
func sealAll(id seal.Identity, r *seal.Roster, key seal.Key, public map[bus.UserKey]bus.EncryptionKey) ([][]byte, error) {
	envelopes, errs := make([][]byte, len(r.Members)), make([]error, len(r.Members))
	var next atomic.Int64
	var workers sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(r.Members)) {
		workers.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(errs); i = int(next.Add(1)) - 1 {
				m := r.Members[i]
				envelopes[i], errs[i] = seal.SealEnvelope(id, r, key, m.User, public[m.User])
			}
		})
	}
	workers.Wait()
	for _, err := range errs {
		if err != nil {
			return nil, err
		}
	}
	return envelopes, nil
}

// whoIsIn decides who gets the next key. The servers' list takes away, and never
// adds: whom they name and nobody admitted is not let in.
func (r *roomKeys) whoIsIn(before *seal.Roster, listed []bus.MemberKey, o RekeyOptions) (map[bus.UserKey]bus.RoomRole, error) {
	me := r.keys.cfg.Identity.Key()
	has := map[bus.UserKey]bus.RoomRole{}
	for _, m := range listed {
		has[m.SignPub] = m.Role
	}
	in := map[bus.UserKey]bus.RoomRole{}
	switch {
	case o.Appointment != nil:
		in[me] = bus.Owner
	case before == nil && r.answer.Creator == me:
		in[me] = bus.Owner
	case before == nil:
		return nil, bus.E(bus.Forbidden, "the first key of room %s is made by who made the room", r.id)
	case !before.IsOwner(me):
		return nil, bus.E(bus.Forbidden, "only an owner in the roster of room %s can make its next key", r.id).
			WithHint("if all of them are lost, a trusted admin runs: unibusctl room appoint %s USER", r.id)
	}
	if has[me] != bus.Owner {
		return nil, bus.E(bus.Forbidden, "the servers say that we are no owner of room %s", r.id)
	}
	if guard.Off(guard.AdmitByOwner) {
		maps.Copy(in, has)
	}
	if before != nil {
		for _, m := range before.Members {
			now, present := has[m.User]
			if !present {
				continue
			}
			if now.Rank() > m.Role.Rank() {
				now = m.Role
			}
			if in[m.User].Rank() < now.Rank() {
				in[m.User] = now
			}
		}
	}
	for _, a := range o.Admit {
		if now := has[a.User]; now.Rank() < a.Role.Rank() || a.Role.Rank() == 0 {
			return nil, bus.E(bus.Conflict, "%s is no active %s of room %s", a.User, a.Role, r.id).WithHint("unibusctl room add %s %s --role %s", r.id, a.User, a.Role)
		}
		in[a.User] = a.Role
	}
	return in, nil
}

// Duty makes the next epoch of a room if it needs one and this user is an owner
// of it: what an owner who is online does for all. It admits nobody.
func (k *Keys) Duty(ctx context.Context, id bus.RoomID) error {
	s, err := k.Room(ctx, id)
	if err != nil || !s.RekeyRequired || !s.Owner {
		return err
	}
	done, err := k.Rekey(ctx, id, RekeyOptions{})
	if err == nil && !done.Already {
		k.cfg.Log.Info("made another key", "room", id, "epoch", done.Epoch, "members", done.Members)
	}
	return err
}

// AddMember adds a user to an encrypted room, or changes their role, and gives
// them its key. Named by handle they are who that handle meant before: see
// Resolve.
func (k *Keys) AddMember(ctx context.Context, id bus.RoomID, user string, role bus.RoomRole) (bus.Change, Rekeyed, error) {
	key, err := k.Resolve(ctx, user)
	if err != nil {
		return bus.Change{}, Rekeyed{}, err
	}
	change, err := k.cfg.API.SetMember(ctx, id, key.NKey(), role)
	if err != nil {
		return change, Rekeyed{}, err
	}
	done, err := k.Rekey(ctx, id, RekeyOptions{Admit: []Admission{{key, role}}})
	return change, done, err
}

// Grant gives a member the keys of all epochs from a first one on that they came
// too late for, as far as this user, an owner, has them. It returns how many.
func (k *Keys) Grant(ctx context.Context, id bus.RoomID, user bus.UserKey, first uint64) (int, error) {
	r := k.of(id)
	if err := r.enter(ctx); err != nil {
		return 0, err
	}
	defer r.leave()
	if err := r.refresh(ctx); err != nil {
		return 0, err
	}
	n := r.newest()
	if n == nil || !n.IsOwner(k.cfg.Identity.Key()) {
		return 0, bus.E(bus.Forbidden, "only an owner in the roster of room %s gives keys", id)
	}
	if _, in := n.Member(user); !in {
		return 0, bus.E(bus.Forbidden, "%s is not in the roster of room %s", user, id).WithHint("unibusctl room rekey %s --admit %s", id, user)
	}
	listed, err := k.cfg.API.MemberKeys(ctx, id)
	if err != nil {
		return 0, err
	}
	i := slices.IndexFunc(listed, func(m bus.MemberKey) bool { return m.SignPub == user && m.EncryptionKey != nil })
	if i < 0 {
		return 0, bus.E(bus.Conflict, "the servers give no encryption key of %s", user)
	}
	if err := k.pinKeys(listed[i : i+1]); err != nil {
		return 0, r.alarmed(err)
	}
	var granted []bus.GrantedKey
	for _, e := range r.chain {
		key, have := r.secrets[e.Epoch]
		if _, in := e.Member(user); e.Epoch < max(first, 1) || in || !have {
			continue
		}
		envelope, err := seal.SealEnvelope(k.cfg.Identity, e, key, user, *listed[i].EncryptionKey)
		if err != nil {
			return 0, err
		}
		granted = append(granted, bus.GrantedKey{Epoch: e.Epoch, Envelope: envelope})
	}
	for part := range slices.Chunk(granted, grantPage) {
		if _, err := k.cfg.API.GrantKeys(ctx, id, user, part); err != nil {
			return 0, err
		}
	}
	return len(granted), nil
}

// appointmentPrefix begins an appointment as it is handed over.
const appointmentPrefix = "uba_"

// Appoint makes somebody an owner of a room whose owners are all lost, if they
// are made one by SetMember too. This user is an admin whom the members have
// pinned; they learn no key. The text is for the new owner's Rekey, and good
// until the room has another epoch.
func (k *Keys) Appoint(ctx context.Context, id bus.RoomID, owner bus.UserKey) (string, error) {
	r := k.of(id)
	if err := r.enter(ctx); err != nil {
		return "", err
	}
	defer r.leave()
	if err := r.refresh(ctx); err != nil {
		return "", err
	}
	epoch, previous := uint64(1), seal.Hash{}
	if n := r.newest(); n != nil {
		epoch, previous = n.Epoch+1, n.Hash()
	}
	a, err := seal.Appoint(k.cfg.Identity, id, epoch, previous, owner)
	if err != nil {
		return "", err
	}
	return appointmentPrefix + base64.RawURLEncoding.EncodeToString(append(a.Admin[:], a.Signature...)), nil
}

// ParseAppointment reads what Appoint wrote.
func ParseAppointment(s string) (*seal.Appointment, error) {
	text, ok := strings.CutPrefix(s, appointmentPrefix)
	raw, err := base64.RawURLEncoding.DecodeString(text)
	if !ok || err != nil || len(raw) != 96 {
		return nil, bus.E(bus.Invalid, "this is no appointment: %s and 128 characters are expected", appointmentPrefix)
	}
	a := &seal.Appointment{Admin: bus.UserKey(raw[:32]), Signature: raw[32:]}
	return a, bus.CheckUserKey(a.Admin)
}
