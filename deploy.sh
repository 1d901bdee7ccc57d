#!/bin/sh
# Installs sftpd on a host as a systemd service. Run again, it upgrades it.
#
#   ./deploy.sh HOST                 install or upgrade; if the new sftpd does not answer, the old one is put back
#   ./deploy.sh --port 22 HOST       listen on this port from now on (default: 2222). The host's own sshd usually has
#                                    port 22 and must move to another port first
#   ./deploy.sh --rollback HOST      put back what the last deploy replaced
#   ./deploy.sh --dry-run HOST       show what would be done; change nothing on the host
#   ./deploy.sh --unit [--port 22]   show the systemd unit
#   ./deploy.sh --help               show this
#
# HOST is any destination that ssh accepts. It needs systemd, bash, tar, and root or sudo. The binary is built here for
# the host's CPU and C library; if SFTPD names a file, that binary is deployed instead. SFTPD_SSH is another ssh
# command, "ssh -F FILE" for example. The unit, its settings file and the script for the host are in contrib/.
set -eu

here=$(cd "$(dirname "$0")" && pwd)

help() {
	sed -n '/^# Installs/,/^set/s/^# \{0,1\}//p' "$0"
}

# Ends with a usage error.
refuse() {
	printf 'deploy.sh: %s\n' "$*" >&2
	help >&2
	exit 2
}

fail() {
	printf 'deploy.sh: %s\n' "$*" >&2
	exit 1
}

show() {
	printf '+ %s\n' "$*" >&2
}

# Prints the unit for this port.
unit() {
	set -- -e "s/^\(Environment=SFTPD_LISTEN=.*:\).*/\1$port/"
	if [ "$port" -lt 1024 ]; then
		# A capability to bind the port counts only in the host's own user namespace.
		set -- "$@" -e 's/^PrivateUsers=.*/PrivateUsers=no/' \
			-e 's/^CapabilityBoundingSet=.*/CapabilityBoundingSet=CAP_NET_BIND_SERVICE/' \
			-e 's/^AmbientCapabilities=.*/AmbientCapabilities=CAP_NET_BIND_SERVICE/'
	fi
	sed "$@" "$here/contrib/sftpd.service"
}

# Sets `binary` to one that runs on the host.
build() {
	[ -e "$here/Cargo.toml" ] || fail 'there is no source here to build from: let SFTPD name a binary from a release'
	ours=$(getconf GNU_LIBC_VERSION 2>/dev/null | sed 's/.*\.//')
	target=$cpu-unknown-linux-gnu
	if [ "$(uname -sm)" = "Linux $cpu" ] && [ "$glibc" -ge "${ours:-999}" ]; then
		set -- build
		binary=$here/target/release/sftpd
	elif command -v cargo-zigbuild >/dev/null; then
		set -- zigbuild --target "$target.2.$glibc"
		binary=$here/target/$target/release/sftpd
	else
		fail "$host has another CPU or an older C library than this machine ($cpu, glibc 2.$glibc). To build for it:" \
			"rustup target add $target && pip install cargo-zigbuild. Or let SFTPD name a binary from a release"
	fi
	set -- cargo "$@" --release --locked --target-dir target
	show "$@"
	[ -n "$dry" ] || (cd "$here" && "$@")
}

dry='' action=deploy asked_port='' host=''
while [ $# -gt 0 ]; do
	case $1 in
	-h | --help)
		help
		exit
		;;
	--dry-run) dry=yes ;;
	--rollback | --unit) action=${1#--} ;;
	--port)
		[ $# -gt 1 ] || refuse '--port needs a number, 22 for example'
		asked_port=$2
		case $asked_port in
		'' | *[!0-9]* | ??????*) refuse "--port $asked_port: a port is a number from 1 to 65535" ;;
		esac
		if [ "$asked_port" -lt 1 ] || [ "$asked_port" -gt 65535 ]; then
			refuse "--port $asked_port: a port is a number from 1 to 65535"
		fi
		shift
		;;
	-*) refuse "there is no option $1" ;;
	'') refuse 'the host is empty' ;;
	*)
		[ -z "$host" ] || refuse "one host at a time: there are $host and $1"
		host=$1
		;;
	esac
	shift
done
port=${asked_port:-2222}
if [ "$action" = unit ]; then
	[ -z "$host" ] || refuse "--unit takes no host: $host"
	unit
	exit
fi
[ -n "$host" ] || refuse 'the host is missing'
if [ "$action" = rollback ] && [ -n "$asked_port" ]; then
	refuse '--rollback takes back the port too: leave --port out'
fi
if [ "$action" = deploy ] && [ -n "${SFTPD:-}" ] && [ ! -f "$SFTPD" ]; then
	refuse "SFTPD=$SFTPD is not a file: correct the path, or unset SFTPD to build one"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
tty=
if [ -t 0 ]; then tty=-t; fi
ssh=${SFTPD_SSH:-ssh}

# Asks the host for CPU, user id, C library, and the port of the last deploy, which stays.
# shellcheck disable=SC2016 # for the host's shell
look='port=$(sed -n "s/^Environment=SFTPD_LISTEN=.*://p" /etc/systemd/system/sftpd.service 2>/dev/null)
	echo "$(uname -sm) $(id -u) ${port:-2222} $(getconf GNU_LIBC_VERSION)"'
show "$ssh -- $host '$look'"
# shellcheck disable=SC2046,SC2086 # words
set -- $($ssh -- "$host" "$look" | tail -n 1)
[ "${5-}" = glibc ] || fail "can't reach $host over ssh, or it is not a Linux with glibc (it answered: $*)"
cpu=$2 port=${asked_port:-$4} glibc=${6#*.}
sudo=sudo
if [ "$3" = 0 ]; then sudo=; fi

set -- install
cp "$here/contrib/install" "$work/install"
if [ "$action" = deploy ]; then
	binary=${SFTPD:-}
	[ -n "$binary" ] || build
	set -- install sftpd sftpd.service sftpd.env users.json
	unit >"$work/sftpd.service"
	cp "$here/contrib/sftpd.env" "$work/sftpd.env"
	echo '{"users": {}}' >"$work/users.json"
	[ -n "$dry" ] || cp "$binary" "$work/sftpd"
fi

# shellcheck disable=SC2016 # for the host's shell
unpack='dir=$(mktemp -d) && tar -xzof - -C "$dir" && echo "$dir"'
show "tar -C $work -czf - $* | $ssh -- $host '$unpack'"
dir=DIR
if [ -z "$dry" ]; then
	# shellcheck disable=SC2029,SC2086 # words of a command
	dir=$(tar -C "$work" -czf - "$@" | $ssh -- "$host" "$unpack" | tail -n 1)
	[ -n "$dir" ] || fail "nothing could be copied to $host"
fi
install="$sudo sh $dir/install $action '$asked_port' '$host'; status=\$?; rm -rf $dir; exit \$status"
show "$ssh${tty:+ $tty} -- $host \"$install\""
if [ -n "$dry" ]; then
	printf '\ninstall, with %s as sftpd.service:\n\n' "\`./deploy.sh --unit --port $port\`"
	cat "$work/install"
	exit
fi
# shellcheck disable=SC2029,SC2086 # words of a command
$ssh $tty -- "$host" "$install"
