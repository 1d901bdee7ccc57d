# shellcheck shell=bash
# What the suites share: an SFTP server with one user on a free port, and the verdict over a suite's results.
#
# A suite sources this, calls `begin`, installs what it needs, calls `start_server`, writes a line a test to $results
# ("passed NAME", "failed NAME" or "skipped NAME"), and ends with `verdict`. What it needs for its client is in $host,
# $port, $user, $key, $known_hosts and $ssh_config; the server's log and what the suite says are in $logs.
#
# The server is sftpd in front of a store in memory, or $SFTPD_STORE. $SFTPD names its binary, else it is
# target/debug/sftpd. With the option --openssh the server is OpenSSH's, for comparison: expected failures don't apply,
# and the suite only prints what failed.

suites=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$suites/../.." && pwd)
packages=$top/target/ci/suites
host=127.0.0.1
user=tester
home=/
as_server=()

begin() {
	suite=$1
	shift
	server=sftpd
	if [[ ${1:-} == --openssh ]]; then
		server=openssh
	fi
	scratch=$(mktemp -d "/tmp/sftpd-suite.XXXXXX")
	trap end EXIT
	logs=$packages/logs/$suite-$server
	results=$logs/results
	key=$scratch/key
	known_hosts=$scratch/known_hosts
	ssh_config=$scratch/ssh_config
	rm -rf "$logs"
	mkdir -p "$logs"
}

# Ends the server, which holds nothing worth keeping.
end() {
	if [[ ${server_pid:-} ]]; then
		kill -KILL -- "-$server_pid" 2>/dev/null || true
		wait "$server_pid" 2>/dev/null || true
	fi
	rm -rf "$scratch"
}

# Installs the Debian packages of lines "FILE-OR-COMMAND PACKAGE" that are missing; a file may be a pattern. As root, on Debian.
install_debian() {
	local found package missing=()
	while read -r found package; do
		command -v "$found" >/dev/null || compgen -G "$found" >/dev/null || missing+=("$package")
	done
	if ((${#missing[@]})); then
		# Several suites may be installing.
		flock "$packages/apt.lock" bash -c 'apt-get update -qq
			DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null' - "${missing[@]}"
	fi
}

# Prints the directory of a Debian package's source, which has the tests that the package lacks. The list of sources is
# kept apart from the machine's own.
fetch_debian_source() {
	local name=$1 version=$2 source=$packages/$1-$2 apt=$packages/apt options
	options=(-o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$apt/lists"
		-o "Dir::Cache::srcpkgcache=$apt/srcpkgcache.bin" -o "Dir::Cache::pkgcache=$apt/pkgcache.bin")
	if [[ ! -d $source ]]; then
		mkdir -p "$apt/lists/partial"
		echo 'deb-src http://deb.debian.org/debian bookworm main' >"$apt/sources.list"
		apt-get "${options[@]}" update -qq
		(cd "$scratch" && apt-get "${options[@]}" source -qq --download-only "$name=$version" 2>/dev/null)
		mkdir "$scratch/$name"
		tar -xf "$scratch/${name}_${version%-*}".orig.tar.* -C "$scratch/$name" --strip-components=1
		mv "$scratch/$name" "$source"
	fi
	echo "$source"
}

# Makes a virtual environment with these Python packages, once.
install_python() {
	local venv=$packages/$suite
	[[ -x $venv/bin/python3 ]] || python3 -m venv "$venv"
	grep -Fqsx "$*" "$venv/installed" || "$venv/bin/python3" -m pip install --quiet --disable-pip-version-check "$@"
	echo "$*" >>"$venv/installed"
	PATH=$venv/bin:$PATH
}

# Prints the directory of a Python package's source, which has the tests that the package lacks.
fetch_python_source() {
	local name=$1 version=$2 source=$packages/$1-$2
	if [[ ! -d $source ]]; then
		"$packages/$suite/bin/python3" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary "$name" \
			--no-build-isolation --dest "$scratch" "$name==$version" >/dev/null
		tar -xzf "$scratch/$name-$version.tar.gz" -C "$packages"
	fi
	echo "$source"
}

# Runs pytest, and adds to the results.
run_pytest() {
	"$packages/$suite/bin/python3" -m pytest -v --tb=short -p no:cacheprovider "$@" >"$logs/pytest.log" 2>&1 || true
	sed -nE 's/^[^ ]*::(test_.*) (PASSED|FAILED|ERROR|SKIPPED)( .*|$)/\2 \1/p' "$logs/pytest.log" |
		sed 's/^PASSED/passed/; s/^FAILED/failed/; s/^ERROR/failed/; s/^SKIPPED/skipped/' >>"$results"
	[[ -s $results ]] || cat "$logs/pytest.log"
}

# The server's keys are made here, so that clients know them.
make_keys() {
	local host_keys=$scratch/host_keys
	mkdir -m 700 "$host_keys"
	ssh-keygen -q -t ed25519 -N '' -C "$user" -f "$key"
	ssh-keygen -q -t ed25519 -N '' -C '' -f "$host_keys/ssh_host_ed25519_key"
}

start_server() {
	make_keys
	case $server in
	sftpd) start_sftpd ;;
	openssh) start_openssh ;;
	esac
	printf '[%s]:%s %s\n' "$host" "$port" "$(cat "$scratch/host_keys/ssh_host_ed25519_key.pub")" >"$known_hosts"
	cat >"$ssh_config" <<-CONFIG
		Host *
		    HostName $host
		    Port $port
		    User $user
		    IdentityFile $key
		    IdentitiesOnly yes
		    UserKnownHostsFile $known_hosts
	CONFIG
}

start_sftpd() {
	local sftpd=${SFTPD:-$top/target/debug/sftpd}
	"$sftpd" users --users "$scratch/users.json" add "$user" "$(cat "$key.pub")" >/dev/null
	SFTPD_STORE=${SFTPD_STORE:-memory:} run_server 'listening on' "$sftpd" serve --listen "$host:0" \
		--users "$scratch/users.json" --host-keys "$scratch/host_keys"
	port=$(sed -n 's/.*listening on .*:\([0-9]*\)$/\1/p' "$logs/server.log")
}

# As a user without rights, so that refusals are tested too. The account nobody counts as locked.
start_openssh() {
	install_debian <<-'PACKAGES'
		/usr/sbin/sshd openssh-server
	PACKAGES
	home=$scratch/home
	mkdir "$home"
	if ((EUID == 0)); then
		user=daemon
		as_server=(setpriv "--reuid=$user" "--regid=$user" --clear-groups)
		chown -R "$user:$user" "$scratch"
		chmod 755 "$scratch"
	else
		user=$(id -un)
	fi
	port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
	cat >"$scratch/sshd_config" <<-CONFIG
		ListenAddress $host:$port
		HostKey $scratch/host_keys/ssh_host_ed25519_key
		AuthorizedKeysFile $key.pub
		PidFile none
		StrictModes no
		UsePAM no
		MaxStartups 1000
		MaxSessions 1000
		Subsystem sftp internal-sftp -d $home
	CONFIG
	run_server 'Server listening on' "${as_server[@]}" /usr/sbin/sshd -D -e -f "$scratch/sshd_config"
}

# Starts a server in a process group of its own, and waits until its log says that it is ready.
run_server() {
	local ready=$1 deadline=$((SECONDS + 30))
	shift
	: >"$logs/server.log"
	setsid "$@" >>"$logs/server.log" 2>&1 &
	server_pid=$!
	until grep -q "$ready" "$logs/server.log"; do
		if ((SECONDS > deadline)) || ! kill -0 "$server_pid" 2>/dev/null; then
			cat "$logs/server.log" >&2
			return 1
		fi
		sleep 0.05
	done
}

# Holds the results against expected/SUITE: names of tests that must fail, each below a comment with the reason. An
# expected failure that passes is an error, so that the list stays true.
verdict() {
	local outcome name passed=0 expected=0 skipped=0
	local -A reasons=()
	local -a failed=()
	if [[ $server == sftpd ]]; then
		while read -r name; do
			[[ -z $name || $name == \#* ]] || reasons[$name]=expected
		done <"$suites/expected/$suite"
	fi
	while read -r outcome name; do
		case $outcome in
		passed) passed=$((passed + 1)) ;;
		skipped) skipped=$((skipped + 1)) ;;
		failed)
			if [[ ${reasons[$name]:-} ]]; then
				expected=$((expected + 1))
				unset "reasons[$name]"
			else
				failed+=("$name")
			fi
			;;
		esac
	done <"$results"
	((${#failed[@]} == 0)) || printf '%s\n' "${failed[@]/#/$suite: failed: }"
	for name in "${!reasons[@]}"; do
		printf '%s: an expected failure did not fail: %s\n' "$suite" "$name"
	done
	printf '%s (%s): %d passed, %d failed, %d expected failures, %d skipped\n' "$suite" "$server" \
		"$passed" "${#failed[@]}" "$expected" "$skipped"
	[[ $server == openssh ]] || ((passed > 0 && ${#failed[@]} == 0 && ${#reasons[@]} == 0))
}
