#!/usr/bin/env bash
# Makes a checkout ready to run: see usage below. Kept to what bash 3.2 understands.
set -euo pipefail

checkout=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$checkout/.venv
python=$venv/bin/python
stamp=$venv/ai-ticket-installed # what was installed: the checkout's path, the extras, a checksum of the sources
ready_seconds=60

usage() {
    cat <<'TEXT'
Usage: ops/bootstrap.sh [--no-local] [--run]
       ops/bootstrap.sh [--no-local] --test [pytest's arguments]
       ops/bootstrap.sh --help

Makes this checkout ready to run, without privileges and without changing anything outside it but caches:
a virtual environment in .venv with AI Ticket installed, a settings file .env, a self-signed certificate in
ops/certs/, a random token in ops/secrets/, and a small language model with a server for it. What is there already
is kept; only the installation is brought up to date with the sources. Run it again at any time.

  --run       then start the service in the foreground, wait until it is ready and print a curl line to try.
              Ctrl-C stops it; the exit status is the service's
  --test      instead install what the tests need and run them; further arguments go to pytest
  --no-local  leave out the bundled model and its server: KOBOLDCPP_API_URL in .env names yours

Environment: PYTHON names the Python to use (3.11 or newer), by default the first that fits of python3, python3.14,
python3.13, python3.12 and python3.11.
TEXT
}

say() { printf 'bootstrap: %s\n' "$*"; }
warn() { printf 'bootstrap: %s\n' "$*" >&2; }
die() {
    warn "$@"
    exit 1
}

# ---- Python and the virtual environment

# Prints the command of a Python that can make the virtual environment.
find_python() {
    local candidate version tried='' unfit=''
    set -- python3 python3.14 python3.13 python3.12 python3.11
    if [[ ${PYTHON:-} ]]; then set -- "$PYTHON"; fi
    for candidate in "$@"; do
        # It has to run, not only to be there: version managers put stubs on the path.
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        tried="$tried $candidate ($version)"
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        unfit=${unfit:-$candidate}
    done
    if [[ $unfit ]]; then
        die "$unfit can't make virtual environments: it has no module venv or ensurepip." "$(venv_advice)"
    fi
    die "Python 3.11 or newer is needed; looked for $*, found:${tried:- none}. On Debian 12, Ubuntu 24.04 or newer:" \
        "apt install python3 python3-venv. If it is somewhere else: PYTHON=/path/to/python3 ops/bootstrap.sh"
}

venv_advice() {
    printf '%s' "On Debian and Ubuntu, virtual environments need a package of their own: apt install python3-venv" \
        " (for another Python than the system's: python3.12-venv or the like). Then run this again."
}

make_venv() {
    if [[ -f $stamp && $(head -n 1 "$stamp") != "$checkout" ]]; then
        say 'this checkout was moved or copied, and a virtual environment does not bear that: making .venv anew'
    elif "$python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        return
    elif [[ -e $venv ]]; then
        say '.venv does not work (any more): making it anew'
    fi
    local maker output
    maker=$(find_python)
    say "making the virtual environment .venv with $maker"
    if ! output=$("$maker" -m venv --clear "$venv" 2>&1); then
        printf '%s\n' "$output" >&2
        rm -rf -- "$venv"
        die "'$maker -m venv --clear $venv' failed, see above." "$(venv_advice)"
    fi
}

# A checksum over all that an installation is made of.
fingerprint() {
    "$python" -I - "$checkout" <<'PYTHON'
import hashlib
import sys
from pathlib import Path

root = Path(sys.argv[1])
files = [root / "setup.py", root / "pyproject.toml", *root.glob("twisted/plugins/*.py")]
files += [file for file in root.glob("ai_ticket/**/*") if file.is_file() and file.suffix != ".pyc"]
digest = hashlib.sha256(sys.version.encode())
for file in sorted(files):
    content = file.read_bytes()
    digest.update(b"%s %d " % (str(file.relative_to(root)).encode(), len(content)) + content)
print(digest.hexdigest())
PYTHON
}

# install EXTRAS: brings the installation in .venv up to date with the sources. EXTRAS: "local,test", may be empty.
install() {
    local extras=$1 sum='' extra had_extras='' had_sum=''
    sum=$(fingerprint)
    if [[ -f $stamp ]]; then
        { read -r _ && read -r had_extras && read -r had_sum; } <"$stamp" || had_sum=''
        for extra in ${extras//,/ }; do
            [[ ,$had_extras, == *,$extra,* ]] || had_sum=''
        done
        [[ $had_sum != "$sum" ]] || return 0
    fi
    say "installing AI Ticket${extras:+ with [$extras]} in .venv; the first time this takes a minute"
    remove_build
    printf '%s\n' "$checkout" >"$stamp" # should this be interrupted, nothing counts as installed
    # Installed and not linked ("editable"), which would hide twisted/plugins.
    if ! (cd "$checkout" && "$python" -m pip install -qq --disable-pip-version-check --no-input ".${extras:+[$extras]}"); then
        die "'.venv/bin/python -m pip install .${extras:+[$extras]}' failed, see above. It needs a network connection" \
            "to a package index (or PIP_INDEX_URL, PIP_FIND_LINKS naming one)."
    fi
    remove_build
    printf '%s\n' "$checkout" "$extras" "$sum" >"$stamp"
}

# setuptools' own copy of the sources. It would bring modules back that are gone from them.
remove_build() { rm -rf -- "$checkout/build/lib" "$checkout"/build/bdist.*; }

# ---- What belongs to this checkout alone. Each is made once and never overwritten.

# complete_env BACKEND: what an .env that somebody else wrote lacks to start, and only that.
complete_env() {
    local file=$checkout/.env backend=$1 lines=''
    names() { printenv "$1" >/dev/null || grep -Eq "^[[:space:]]*(export[[:space:]]+)?$1=." "$file"; }
    names AI_TICKET_AUTH_TOKEN_FILE || names AI_TICKET_AUTH_TOKEN || names AI_TICKET_AUTH ||
        lines+=$'AI_TICKET_AUTH_TOKEN_FILE=ops/secrets/ai_ticket_auth_token.txt\n'
    [[ $backend == '#'* ]] || names KOBOLDCPP_API_URL || lines+=$backend$'\n'
    [[ -n $lines ]] || return 0
    say "adding to .env: ${lines//$'\n'/ }"
    [[ -z $(tail -c 1 -- "$file") ]] || lines=$'\n'$lines
    printf %s "$lines" >>"$file"
}

make_env() {
    local file=$checkout/.env backend=$1
    if [[ -e $file ]]; then
        complete_env "$backend"
        return 0
    fi
    say 'writing .env'
    (
        umask 077
        cat >"$file.new" <<TEXT
# Settings of this checkout. ops/bootstrap.sh wrote this file and won't touch it again; etc/ai-ticket.env explains
# every setting. The environment wins over this file. Paths start at the folder that the service is started in.

# The model server: KoboldCPP's address, or local: for the bundled one.
$backend

# The tokens that callers may use.
AI_TICKET_AUTH_TOKEN_FILE=ops/secrets/ai_ticket_auth_token.txt

# Where the service listens, and its certificate. These are the defaults.
#TLS_PORT=8443
#TLS_CERT_FILE=ops/certs/server.crt
#TLS_KEY_FILE=ops/certs/server.key

# Traces go nowhere. Without this line they go to standard error, or to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names.
OTEL_TRACES_EXPORTER=none
TEXT
        mv -- "$file.new" "$file"
    )
}

make_certificate() {
    local crt=$checkout/ops/certs/server.crt key=$checkout/ops/certs/server.key
    if [[ -e $crt ]]; then
        [[ -e $key ]] || warn 'ops/certs/server.crt has no server.key beside it; delete it to get a new pair'
        return 0
    fi
    say 'making a self-signed certificate, ops/certs/server.crt'
    "$checkout/ops/make-cert.sh"
}

make_token() {
    local file=$checkout/ops/secrets/ai_ticket_auth_token.txt
    [[ ! -e $file ]] || return 0
    say 'making a random token, ops/secrets/ai_ticket_auth_token.txt'
    (
        umask 077
        mkdir -p -- "$checkout/ops/secrets"
        "$python" -I -c 'import secrets; print(secrets.token_urlsafe(32))' >"$file.new"
        mv -- "$file.new" "$file"
    )
}

make_model() {
    local output alternative="Or use a KoboldCPP server of your own: --no-local leaves the bundled one out"
    if ! output=$("$python" -I -c 'import xllamacpp' 2>&1); then
        # Its own package can't ask for a library of the system.
        die "the bundled model server can't be loaded: ${output##*$'\n'}." \
            "If it is libgomp.so.1 that is missing, on Debian and Ubuntu: apt install libgomp1. $alternative"
    fi
    "$venv/bin/ai-ticket" fetch-model >/dev/null || die "'.venv/bin/ai-ticket fetch-model' failed, see above. $alternative"
}

# ---- Running

# settings NAME...: prints the value in force of each, one a line.
settings() {
    "$python" -I - "$@" <<'PYTHON'
import os
import sys

from ai_ticket.environment import load

settings = load(os.environ).settings
for name in sys.argv[1:]:
    value = getattr(settings, name)
    print("" if value is None else value)
PYTHON
}

# wait_ready PID HOST PORT CERTIFICATE: waits for the service to be ready, and says what /health says.
# Exit status: 0 ready, 10 ready but the certificate does not fit, 11 not ready in time, 12 the process is gone.
wait_ready() {
    "$python" -I - "$@" "$ready_seconds" <<'PYTHON'
import http.client
import json
import os
import socket
import ssl
import sys
import time

pid, host, port, certificate, seconds = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
status, context = 0, None


def ask(path: str) -> tuple[int, bytes]:
    plain = socket.create_connection((host, port), timeout=5)
    connection = http.client.HTTPConnection("localhost", port)
    # As curl does it: the certificate is trusted for itself, whoever signed it.
    connection.sock = context.wrap_socket(plain, server_hostname="localhost")
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read()


end = time.monotonic() + seconds
while time.monotonic() < end:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        sys.exit(12)
    try:
        if context is None:
            context = ssl.create_default_context(cafile=certificate)
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if ask("/health/ready")[0] == 200:
            break
    except ssl.SSLCertVerificationError as error:
        print(f"bootstrap: the certificate does not fit https://localhost: {error.verify_message}", file=sys.stderr)
        status, context = 10, ssl._create_unverified_context()
    except (OSError, http.client.HTTPException):
        pass
    time.sleep(0.5)
else:
    status = 11
try:
    health = json.loads(ask("/health")[1])
    print(f"bootstrap: /health: {json.dumps(health)}", flush=True)
except (OSError, http.client.HTTPException, ValueError) as error:
    print(f"bootstrap: /health does not answer: {error}", file=sys.stderr)
    status = 11
sys.exit(status)
PYTHON
}

absolute() {
    case $1 in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s\n' "$checkout/$1" ;;
    esac
}

# curl_line HOST PORT TRUST...: a command that asks the service something, for pasting in any folder.
curl_line() {
    local host=$1 port=$2 auth tokens
    shift 2
    printf 'curl'
    printf ' %q' "$@"
    case $host in
    localhost) ;;
    *:*) printf ' --resolve %q' "localhost:$port:[$host]" ;;
    *) printf ' --resolve %q' "localhost:$port:$host" ;;
    esac
    if [[ ${https_proxy:-}${HTTPS_PROXY:-}${all_proxy:-}${ALL_PROXY:-} ]]; then printf ' --noproxy localhost'; fi
    { read -r auth && read -r tokens; } <<<"$(settings ai_ticket_auth ai_ticket_auth_token_file)"
    # Skips comments and hashed tokens, and takes the token of `name token`. Without an exclamation mark, which an
    # interactive shell would read as history.
    local first="awk '/^[ \\t]*(#|\$)|sha256:/ {next} {print \$NF; exit}'"
    if [[ $auth == True && $tokens ]]; then
        # shellcheck disable=SC2016 # expanded where it is pasted
        printf ' -H "Authorization: Bearer $(%s %q)"' "$first" "$(absolute "$tokens")"
    elif [[ $auth == True ]]; then
        printf " -H 'Authorization: Bearer YOUR_TOKEN'"
    fi
    printf " -H 'Content-Type: application/json'"
    printf " -d '%s'" '{"content": "Why is the sky blue?", "parameters": {"max_tokens": 60}}'
    printf ' https://localhost:%s/event\n' "$port"
}

daemon=
poll=
signalled=

# Passes a signal on: the service drains on the first and ends at once on the second.
stop() {
    signalled=yes
    [[ -z $poll ]] || kill -TERM -- "-$poll" 2>/dev/null || true # with what it started
    [[ -z $daemon ]] || kill -TERM "$daemon" 2>/dev/null || true
}

# Waits for a child to its very end, through the signals that `wait` returns early for. Its status is the child's.
await() {
    local status
    while :; do
        signalled=
        status=0
        wait "$1" || status=$?
        [[ $signalled ]] || return "$status"
    done
}

run_service() {
    local values host port crt status=0 outcome=0
    values=$(settings bind_host tls_port tls_cert_file)
    { read -r host && read -r port && read -r crt; } <<<"$values"
    crt=$(absolute "$crt")
    case $host in '' | 0.0.0.0 | ::) host=localhost ;; esac
    [[ $port != 0 ]] || die "TLS_PORT=0 lets the kernel pick a port that this script can't know; set another for --run"
    if (: <>"/dev/tcp/$host/$port") 2>/dev/null; then
        die "something listens on port $port already. Stop it, or set another TLS_PORT in .env"
    fi

    trap stop EXIT HUP INT TERM
    # Each in a process group of its own (set -m): Ctrl-C would else reach the service twice, from the terminal and from
    # here, and the second signal ends it at once.
    set -m
    "$venv/bin/twistd" -n --pidfile= -y ai_ticket.tac </dev/null &
    daemon=$!
    say "the service runs as process $daemon; waiting up to $ready_seconds s until it is ready"
    wait_ready "$daemon" "$host" "$port" "$crt" &
    poll=$!
    set +m
    await "$poll" || status=$?
    poll=
    case $status in
    0) announce "$host" "$port" --cacert "$crt" ;;
    10) announce "$host" "$port" --insecure ;;
    11) warn "not ready after $ready_seconds s: no model server answers, or it still loads; the log above says more." \
        "The service goes on running and trying. Ctrl-C stops it" ;;
    esac
    await "$daemon" || outcome=$?
    daemon=
    if [[ $status == 12 && $outcome != 0 ]]; then
        warn "the service ended with status $outcome before it was ready; its last lines above say why"
    else
        say "the service ended with status $outcome"
    fi
    return "$outcome"
}

announce() {
    say 'ready. From any folder:'
    printf '\n%s\n\n' "$(curl_line "$@")"
    say 'Ctrl-C stops the service'
}

main() {
    local mode=prepare local_model=local
    while (($#)); do
        case $1 in
        -h | --help)
            usage
            return
            ;;
        --no-local) local_model= ;;
        --run) mode=run ;;
        --test) mode=tests ;;
        --)
            shift
            break
            ;;
        *) break ;;
        esac
        shift
    done
    if (($#)) && [[ $mode != tests ]]; then
        usage >&2
        die "unknown argument: $1"
    fi

    cd "$checkout"
    if [[ $mode == tests ]]; then
        make_venv
        install "${local_model:+$local_model,}test"
    else
        make_certificate # first, to say at once where openssl is missing
        make_venv
        make_token
        if [[ $local_model ]]; then
            make_env 'KOBOLDCPP_API_URL=local:'
        else
            make_env '#KOBOLDCPP_API_URL=http://localhost:5001/api'
        fi
        install "$local_model"
    fi
    if [[ $local_model ]]; then make_model; fi
    if [[ $mode == tests ]]; then
        exec "$python" -m pytest "$@"
    fi
    "$venv/bin/ai-ticket" check-config >/dev/null || die "the settings can't be used, see above; they come from .env and the environment"
    if [[ $mode == run ]]; then
        run_service
        return
    fi
    say "all set, with the model server $(settings koboldcpp_api_url)"
    say 'ops/bootstrap.sh --run starts the service and shows how to ask it something; --test runs the tests'
    say '.env holds the settings, etc/ai-ticket.env explains them all'
}

# Not when sourced: tests call single functions.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    main "$@"
fi
