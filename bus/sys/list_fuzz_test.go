package sys

import "testing"

// FuzzParsePage: the reader of lists never fails otherwise than by saying so.
func FuzzParsePage(f *testing.F) {
	f.Add([]byte(`{"server":{"name":"n1","id":"NA"},"data":{"offset":4,"connections":[{"cid":7,"ip":"198.51.100.7","authorized_user":"U"},{"cid":9}]}}`))
	f.Add([]byte(`{"server":{"name":"n1","id":"NA"},"error":{"code":500}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, ok := parsePage(data)
		if ok && p.server == "" {
			t.Errorf("%q is of no server", data)
		}
		for _, c := range p.rows {
			_ = c.Traffic()
		}
	})
}
