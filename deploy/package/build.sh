#!/usr/bin/env bash
# usage: build.sh BIN OUT VERSION
# Makes OUT/unibus_VERSION_ARCH.deb and OUT/unibus-VERSION.ARCH.rpm from the
# programs in BIN, with BIN/tools/nfpm. VERSION is what git describe says; without
# a tag it becomes one that any release is newer than. From equal programs of one
# commit come equal packages.
set -euo pipefail

bin=$(cd "$1" && pwd)
mkdir -p "$2"
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/../.."

if [[ $3 =~ ^v?([0-9]+\.[0-9.]+)(.*)$ ]]; then
	version=${BASH_REMATCH[1]}${BASH_REMATCH[2]//-/.}
else
	version=0~$(TZ=UTC git log -1 --format=%cd --date=format-local:%Y%m%d%H%M).${3//-/.}
fi

STAGE=$(mktemp -d)
trap 'rm -rf "$STAGE"' EXIT
mkdir "$STAGE/bin"
cp "$bin"/{unibusctl,unibus-membership,unibus-authcallout,nats-server} "$STAGE/bin"

# page NAME LINE UNIT: a manual page of a service, its flags as it says them.
page() {
	local name=$1 does=$2
	{
		printf '.TH %s 8 "" "unibus" "unibus"\n.SH NAME\n%s \\- %s\n' "${name^^}" "${name//-/\\-}" "$does"
		printf '.SH SYNOPSIS\n.B %s\n[flags]\n.SH DESCRIPTION\n' "${name//-/\\-}"
		printf 'Runs on every node, as %s.service. Each flag has a variable, which the unit takes from\n' "${name//-/\\-}"
		printf '/etc/unibus/%s.env.\n.SH FLAGS\n' "${name#unibus-}"
		# "  -flag type", then its meaning behind a tab.
		"$STAGE/bin/$name" -help 2>&1 | sed -e 's/\\/\\e/g' -e 's/-/\\-/g' -e 1d \
			-e 's/^  \(\\-.*\)$/.TP\n.B \1/' -e 's/^[[:space:]]*\t//'
		printf '.SH EXIT STATUS\n.TP\n.B 0\nstopped\n.TP\n.B 69\ncannot listen\n.TP\n.B 78\n'
		printf 'wrong configuration: starting it again does not mend it\n'
		printf '.SH SEE ALSO\nunibusctl(1), /usr/share/doc/unibus/operations.md\n'
	} | gzip -9n >"$STAGE/$name.8.gz"
}
page unibus-membership 'the HTTPS API of a node, and its health'
page unibus-authcallout 'decides who may connect to the bus, and closes who may not'
"$bin/unibusctl" manual | gzip -9n >"$STAGE/unibusctl.1.gz"
for shell in bash zsh fish; do "$bin/unibusctl" completion $shell >"$STAGE/unibusctl.$shell"; done

# nats-server is somebody else's, and its licence goes with it.
{
	printf 'unibus is for the use of those who run it.\n\n'
	printf '/usr/lib/unibus/nats-server: Copyright The NATS Authors, unchanged, under this licence:\n\n'
	cat "$(cd test && go list -m -f '{{.Dir}}' github.com/nats-io/nats-server/v2)/LICENSE"
} >"$STAGE/copyright"

# nfpm knows variables in some places only.
sed -e "s|\${STAGE}|$STAGE|" -e "s|\${ARCH}|$(go env GOARCH)|" -e "s|\${VERSION}|$version|" deploy/package/nfpm.yaml >"$STAGE/nfpm.yaml"
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
for kind in deb rpm; do
	rm -f "$out"/*."$kind"
	said=$("$bin/tools/nfpm" package --config "$STAGE/nfpm.yaml" --packager "$kind" --target "$out/" 2>&1) || { echo "$said" >&2; exit 1; }
	grep '^created' <<<"$said"
done
