package test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"unibus.internal/test/cluster"
)

// TestDeployPlanted: what would not work on the nodes is named before any of
// them is reached. What is sound gets as far as ssh, which names the host that
// does not answer; nothing is started, and nothing is left behind.
func TestDeployPlanted(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("ssh"); err != nil {
		t.Skip("needs ssh")
	}
	off := os.Getenv("UNIBUS_GUARD_OFF")
	bin, dir := cluster.Binaries(t, off != ""), t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(path(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctl := func(args ...string) (int, string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "unibusctl"), args...)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "TMPDIR=" + path("tmp"), "UNIBUS_GUARD_OFF=" + off}
		var said bytes.Buffer
		cmd.Stdout, cmd.Stderr = &said, &said
		if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
			t.Fatal(err)
		}
		return cmd.ProcessState.ExitCode(), said.String()
	}
	must := func(args ...string) {
		t.Helper()
		if code, said := ctl(args...); code != 0 {
			t.Fatalf("unibusctl %s: exit %d: %s", strings.Join(args, " "), code, said)
		}
	}
	if err := os.Mkdir(path("tmp"), 0o700); err != nil {
		t.Fatal(err)
	}
	rows := "UNIBUS_CLUSTER=unibus\nROUTE_NETWORK=private\n"
	for i := 1; i <= 3; i++ {
		rows += fmt.Sprintf("NODE_%d=\"n%d ssh=root@n%d.test public=198.18.0.%d private=10.0.0.%d\"\n", i, i, i, i, i)
	}
	write("nodes.env", rows)
	write("ssh_config", "Host *\n  ProxyCommand false\n")
	must("config", "init", "--dir", path("secrets"))
	must("pki", "init", "--dir", path("pki"))
	must("pki", "issue", "--dir", path("pki"), "--inventory", path("nodes.env"))
	ca := func(name string) string { return path("pki/" + name + "-ca.crt") }
	seed := func(name string) string { return path("secrets/" + name + ".nk") }
	const nowhere = "n1 is not reached by ssh"
	for _, f := range []struct {
		name, file string
		content    func(was string) string
		code       int
		want       string
	}{
		{"sound", "nodes.env", func(was string) string { return was }, 3, nowhere},
		{"an expired certificate", "pki/n2/server.crt", func(string) string {
			return signedAnew(t, ca("client"), path("pki/n2/server.crt"), -time.Hour)
		}, 1, "n2/etc/tls/server.crt: has expired"},
		{"an expired route", "pki/n3/route.crt", func(string) string {
			return signedAnew(t, ca("cluster"), path("pki/n3/route.crt"), -time.Hour)
		}, 1, "has expired"},
		{"a seed of another user", "secrets/issuer.nk", func(string) string { return contentOf(t, seed("ops")) }, 1, "issuer.nk"},
		{"mended", "nodes.env", func(was string) string { return was }, 3, nowhere},
	} {
		was := contentOf(t, path(f.file))
		write(f.file, f.content(was))
		code, said := ctl("deploy", "stage", "--inventory", path("nodes.env"), "--secrets", path("secrets"), "--pki", path("pki"), "--yes",
			"--bin", bin, "--units", "../deploy/systemd", "--ssh-config", path("ssh_config"))
		if code != f.code || !strings.Contains(said, f.want) {
			t.Errorf("%s: exit %d, want %d and %q:\n%s", f.name, code, f.code, f.want, said)
		}
		write(f.file, was)
		if left, err := os.ReadDir(path("tmp")); err != nil || len(left) != 0 {
			t.Errorf("%s: left behind %v, %v", f.name, left, err)
		}
	}
}

func contentOf(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
