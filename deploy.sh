#!/bin/sh
# Puts sftpd on a host as a systemd service; run again, it upgrades it.
#
#   ./deploy.sh HOST                 install or upgrade; if the new sftpd doesn't answer, the old one is put back
#   ./deploy.sh --port 22 HOST       listen there from now on; at first it is 2222. The host's own sshd is on 22
#                                    as a rule, and has to move to another port before
#   ./deploy.sh --rollback HOST      back to what was there before the last deploy
#   ./deploy.sh --dry-run HOST       show what would be done; on the host, only look
#   ./deploy.sh --unit [--port 22]   show the systemd unit
#   ./deploy.sh --help               show this
#
# HOST is whatever ssh takes; it needs systemd, bash, tar, and root or sudo behind ssh. What is deployed is built here for
# its CPU and C library, or is the file that SFTPD names. SFTPD_SSH is another ssh command, "ssh -F FILE" for example.
set -eu

help() {
	sed -n '/^#$/,/^set/s/^# \{0,1\}//p' "$0"
}

# For what was typed wrong.
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

unit() {
	# A capability for ports below 1024 counts in the host's user namespace only.
	if [ "$port" -lt 1024 ]; then capability=CAP_NET_BIND_SERVICE own_users=no; else capability='' own_users=yes; fi
	cat <<UNIT
# Each deploy replaces this file: configuration belongs into /etc/sftpd/sftpd.env, anything else into
# \`systemctl edit sftpd\`.
[Unit]
Description=SFTP server that streams uploads into S3
Wants=network-online.target
After=network-online.target
# Never give up: S3 or the network may be away for long.
StartLimitIntervalSec=0

[Service]
Type=notify
Environment=SFTPD_LISTEN=0.0.0.0:$port
Environment=SFTPD_USERS=/etc/sftpd/users.json
Environment=SFTPD_HOST_KEYS=/var/lib/sftpd/host_keys
EnvironmentFile=/etc/sftpd/sftpd.env
ExecStart=/usr/local/bin/sftpd serve
TimeoutStartSec=30
WatchdogSec=30
Restart=on-failure
RestartSec=2
# A mistake in the configuration: another try would end the same.
RestartPreventExitStatus=2
# More than SFTPD_DRAIN_TIMEOUT (60 s) and the 20 s that aborting the rest may take.
TimeoutStopSec=90
LimitNOFILE=65536
# 34 MiB, SFTPD_BUFFER_MEMORY (256 MiB), and 10.25 MiB for each of 64 uploads at once: 946 MiB. For more, write
# [Service] and MemoryMax=2G into \`systemctl edit sftpd\`.
MemoryMax=1G

User=sftpd
StateDirectory=sftpd
StateDirectoryMode=0700
UMask=0077
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateMounts=yes
PrivateDevices=yes
DevicePolicy=closed
PrivateUsers=$own_users
CapabilityBoundingSet=$capability
AmbientCapabilities=$capability
NoNewPrivileges=yes
ProtectProc=invisible
ProcSubset=pid
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
PrivateIPC=yes
RemoveIPC=yes
KeyringMode=private
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
# AF_UNIX carries readiness and the watchdog's signs of life to systemd.
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
UNIT
}

settings() {
	cat <<'SETTINGS'
# Configuration of sftpd, NAME=VALUE: every SFTPD_ variable in its README, and those of the AWS SDK.
# Changes count after `sudo systemctl restart sftpd`.

#SFTPD_STORE=s3://BUCKET/PREFIX
#AWS_REGION=eu-central-1

# Not needed where the host has a role.
#AWS_ACCESS_KEY_ID=
#AWS_SECRET_ACCESS_KEY=

# An S3 server other than Amazon's.
#AWS_ENDPOINT_URL=https://s3.example.com

# Whoever raises it has to raise MemoryMax too: `systemctl cat sftpd` says how.
#SFTPD_BUFFER_MEMORY=256MiB
SETTINGS
}

# Run by root on the host, beside the files to install.
install_script() {
	cat <<'SCRIPT'
set -eu
action=$1 port=$2 host=$3
here=$(dirname "$0")
binary=/usr/local/bin/sftpd unit=/etc/systemd/system/sftpd.service settings=/etc/sftpd/sftpd.env

trap 'rm -f $binary.new $unit.new' EXIT

fail() {
	printf 'deploy.sh: %s: %s\n' "$host" "$*" >&2
	exit 1
}

# Of the running process: the unit and the settings together.
variable() {
	tr '\0' '\n' <"/proc/$(systemctl show --property MainPID --value sftpd)/environ" | sed -n "s/^$1=//p"
}

# Restarts it, and reads what it says to clients; shows the log if that isn't SSH.
answers() {
	began=$(date +%s)
	if systemctl restart sftpd; then
		address=$(variable SFTPD_LISTEN)
		# An empty variable counts as unset.
		address=${address:-0.0.0.0:2222}
		# A port alone, with or without a colon, is that port of all addresses.
		case $address in
		:*) reachable=127.0.0.1$address ;;
		*:*) reachable=$(printf %s "$address" | tr -d '[]') ;;
		*) reachable=127.0.0.1:$address ;;
		esac
		# A server that takes its host for a load balancer says nothing before this.
		header=''
		[ -z "$(variable SFTPD_PROXY_PROTOCOL)" ] || header='PROXY UNKNOWN\r\n'
		greet='exec 3<>"/dev/tcp/${1%:*}/${1##*:}" && printf "$2" >&3 && read -r line <&3 && echo "$line"'
		case $(timeout 10 bash -c "$greet" - "$reachable" "$header") in SSH-2.0-sftpd*) return 0 ;; esac
	fi
	journalctl --unit sftpd --since "@$began" --lines 20 --output cat --no-pager >&2
	return 1
}

if [ "$action" = rollback ]; then
	if [ ! -e $binary.previous ] || [ ! -e $unit.previous ]; then fail 'there is nothing to go back to'; fi
	cp -p $binary.previous $binary.new
	cp -p $unit.previous $unit.new
else
	if [ -n "$port" ] && grep -qs '^SFTPD_LISTEN=' $settings; then fail "SFTPD_LISTEN in $settings has the last word: remove it first"; fi
	install -m 755 "$here/sftpd" $binary.new
	timeout 10 $binary.new --version >/dev/null || fail 'this binary does not run here; nothing has changed'
	install -m 644 "$here/sftpd.service" $unit.new
	id sftpd >/dev/null 2>&1 ||
		useradd --system --user-group --home-dir /var/lib/sftpd --no-create-home --shell /usr/sbin/nologin sftpd
	[ -e /etc/sftpd ] || install -d -m 750 -g sftpd /etc/sftpd
	[ -e $settings ] || install -m 600 "$here/sftpd.env" $settings
	[ -e /etc/sftpd/users.json ] || install -m 600 -o sftpd -g sftpd "$here/users.json" /etc/sftpd/users.json
fi

# The two belong together. The same once more leaves alone what there is to go back to.
changed=
if ! cmp -s $binary.new $binary || ! cmp -s $unit.new $unit; then
	for file in $binary $unit; do
		[ ! -e $file ] || ln -f $file $file.previous
		mv -f $file.new $file
	done
	changed=yes
fi
systemctl daemon-reload

if ! grep -q '^SFTPD_STORE=.' $settings; then
	cat <<NEXT
sftpd is installed on $host, and not started: it has no bucket yet. What is left to do:
  1. there, write SFTPD_STORE and what AWS needs into $settings (as root)
  2. here, add a user:  ./manage-users --host $host add alice "ssh-ed25519 AAAA..."
  3. here, start it:    ./deploy.sh $host
NEXT
	exit
fi
systemctl --quiet enable sftpd
if answers; then
	echo "$($binary --version) answers on $host at $address"
	exit
fi
if [ -z "$changed" ] || [ ! -e $binary.previous ] || [ ! -e $unit.previous ]; then
	fail "sftpd does not answer, its log is above: correct $settings, then deploy again"
fi
for file in $binary $unit; do
	mv -f $file.previous $file
done
systemctl daemon-reload
answers || fail "neither the new nor the old sftpd answers, their log is above: correct $settings, then deploy again"
fail 'the new sftpd does not answer, its log is above; the old one is back and answers'
SCRIPT
}

# Sets binary to one for the host.
build() {
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
	unit
	exit
fi
[ -n "$host" ] || refuse 'the host is missing'
if [ "$action" = rollback ] && [ -n "$asked_port" ]; then
	refuse '--rollback takes back the port too, so --port has no place beside it'
fi

here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
tty=
if [ -t 0 ]; then tty=-t; fi
ssh=${SFTPD_SSH:-ssh}

# What a deploy has to know of the host. The port of the last one stays.
# shellcheck disable=SC2016 # for the host's shell
look='port=$(sed -n "s/^Environment=SFTPD_LISTEN=.*://p" /etc/systemd/system/sftpd.service 2>/dev/null)
	echo "$(uname -sm) $(id -u) ${port:-2222} $(getconf GNU_LIBC_VERSION)"'
show "$ssh -- $host '$look'"
# shellcheck disable=SC2046,SC2086 # words
set -- $($ssh -- "$host" "$look" | tail -n 1)
[ "${5-}" = glibc ] || fail "$host can't be asked over ssh, or is not a Linux with glibc (it says: $*)"
cpu=$2 port=${asked_port:-$4} glibc=${6#*.}
sudo=sudo
if [ "$3" = 0 ]; then sudo=; fi

set -- install
install_script >"$work/install"
if [ "$action" = deploy ]; then
	binary=${SFTPD:-}
	[ -n "$binary" ] || build
	set -- install sftpd sftpd.service sftpd.env users.json
	unit >"$work/sftpd.service"
	settings >"$work/sftpd.env"
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
