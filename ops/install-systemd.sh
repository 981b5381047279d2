#!/usr/bin/env bash
# Installs AI Ticket as a service of systemd: see usage below.
set -euo pipefail

# shellcheck source=ops/bootstrap.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/bootstrap.sh" # checkout, find_python, fingerprint
unset -f install                                        # the command is meant

units=(ai-ticket.service ai-ticket.socket ai-ticket-http.socket)
keep=2 # releases: the current one and the one before

usage() {
    cat <<'TEXT'
Usage: ops/install-systemd.sh [--extras NAMES] [--no-start]   install, or upgrade to what this checkout has
       ops/install-systemd.sh --rollback                      go back to the release before
       ops/install-systemd.sh --uninstall [--purge]           undo it; with --purge the settings, tokens and keys too

Puts a release with a virtual environment of its own in /opt/ai-ticket/releases, makes /opt/ai-ticket/current point at
it, puts the units in /etc/systemd/system, and starts them. In /etc/ai-ticket it makes what is not there yet:
ai-ticket.env, a random token in secrets/ and a self-signed certificate in certs/. Run it again at any time: what has
not changed is kept, and the service is restarted only for a new release or new units.

  --extras NAMES  of setup.py, separated by commas; else those of the release that is there, or redis. `local` brings
                  the bundled model server and its model
  --no-start      leave the service as it is, running or not
  --dry-run       print the commands instead, and change nothing
  --root FOLDER   install under FOLDER instead of /, and don't call systemctl; needs no privileges

Environment: PYTHON names the Python to use (3.11 or newer).
TEXT
}

say() { printf 'install-systemd: %s\n' "$*"; }
warn() { printf 'install-systemd: %s\n' "$*" >&2; }

root=
dry=
start=yes
extras=
extras_given=

# run COMMAND...: or only print it.
run() {
    if [[ $dry ]]; then
        printf '+'
        printf ' %q' "$@"
        printf '\n'
    else
        "$@"
    fi
}

# Talks to systemd, where there is one to talk to.
control() {
    if [[ ! $root && ($dry || -d /run/systemd/system) ]]; then run systemctl "$@"; fi
}

# put MODE SOURCE TARGET: copies a file; exit status 1 if it was the same already.
put() {
    if cmp -s -- "$2" "$3"; then return 1; fi
    run install -D -m "$1" -- "$2" "$3"
}

# write FILE LINE
# shellcheck disable=SC2016 # for the shell that is called
write() { run sh -c 'printf "%s\n" "$2" >"$1"' sh "$1" "$2"; }

# point LINK RELEASE: atomically.
point() {
    run ln -sfn -- "$2" "$1.new"
    run mv -T -- "$1.new" "$1"
}

# ---- The program

# Prints the names of the releases, the newest last.
releases() {
    local stamp
    for stamp in "$opt"/releases/*/installed; do
        [[ -e $stamp ]] || continue
        printf '%s %s\n' "$(stat -c %Y -- "$stamp")" "$(basename -- "$(dirname -- "$stamp")")"
    done | sort -n | cut -d ' ' -f 2-
}

# install_release NAME PYTHON
install_release() {
    local release=$opt/releases/$1 maker=$2 sources
    [[ ! -e $release/installed ]] || return 0
    say "installing ${extras:+with [$extras] }in $release; this takes a minute"
    run rm -rf -- "$release"
    run mkdir -p -- "$release"
    run "$maker" -m venv "$release"
    # From a copy, for building leaves files of root's among the sources.
    sources=$(mktemp -d)
    run cp -R -- "$checkout"/{setup.py,pyproject.toml,README.md,ai_ticket,twisted} "$sources"
    run "$release/bin/python" -m pip install -qq --disable-pip-version-check --no-input "$sources${extras:+[$extras]}"
    rm -rf -- "$sources"
    # The service can't write there: Twisted's list of plugins is made now.
    run "$release/bin/python" -I -c 'import twisted.plugin, twisted.application.service as service
list(twisted.plugin.getPlugins(service.IServiceMaker))'
    write "$release/installed" "$extras"
}

# Keeps those that one can go back to, also where they are not the newest.
prune_releases() {
    local name kept
    kept=" $(readlink -- "$opt/current" || true) $(readlink -- "$opt/previous" || true) "
    releases | head -n "-$keep" | while read -r name; do
        [[ $kept == *" releases/$name "* ]] || run rm -rf -- "$opt/releases/$name"
    done
}

# What runs, or is about to: a release and units. Written to $opt/in-force once systemd has taken it.
wanted() { printf '%s %s' "$1" "$(cat -- "${units[@]/#/$checkout/etc/systemd/}" | sha256sum | cut -d ' ' -f 1)"; }

# ---- What is of this machine alone. Each is made once and never overwritten.

make_settings() {
    local file=$etc/ai-ticket.env
    [[ ! -e $file ]] || return 0
    say "writing $file"
    run install -D -m 0600 -- "$checkout/etc/ai-ticket.env" "$file.new"
    # shellcheck disable=SC2016 # not a command
    run sed -i -E \
        -e 's|^#(AI_TICKET_AUTH_TOKEN_FILE)=.*|# For `ai-ticket` when root calls it. The service has its copies of these three: LoadCredential= of its unit.\n\1=/etc/ai-ticket/secrets/ai_ticket_auth_token.txt|' \
        -e 's|^#(TLS_CERT_FILE)=.*|\1=/etc/ai-ticket/certs/server.crt|' \
        -e 's|^#(TLS_KEY_FILE)=.*|\1=/etc/ai-ticket/certs/server.key|' "$file.new"
    run mv -- "$file.new" "$file"
}

make_token() {
    local file=$etc/secrets/ai_ticket_auth_token.txt
    [[ ! -e $file ]] || return 0
    say "making a random token, $file"
    run install -d -m 0700 -- "$etc/secrets"
    # shellcheck disable=SC2016 # for the shell that is called
    run sh -c 'umask 077; openssl rand -hex 32 >"$1.new" && mv -- "$1.new" "$1"' sh "$file"
}

make_certificate() {
    [[ ! -e $etc/certs/server.crt ]] || return 0
    say "making a self-signed certificate, $etc/certs/server.crt"
    run "$checkout/ops/make-cert.sh" --out "$etc/certs"
}

# ---- Modes

install_all() {
    local maker name unit wanted before
    maker=$(find_python)
    case $("$maker" -c 'import os, sys; print(os.path.realpath(sys.executable))') in
    /home/* | /root/* | /run/user/*)
        [[ $root ]] || die "$maker is in somebody's home, where the service can't read it." \
            "PYTHON=/usr/bin/python3 ops/install-systemd.sh names another"
        ;;
    esac
    command -v openssl >/dev/null || die "openssl is missing. On Debian and Ubuntu: apt install openssl"
    if [[ ! $extras_given ]]; then extras=$(cat -- "$opt/current/installed" 2>/dev/null || echo redis); fi
    make_settings
    make_token
    make_certificate
    python=$(command -v -- "$maker")
    name=$(printf '%s %s' "$(fingerprint)" "$extras" | sha256sum)
    name=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$checkout/ai_ticket/__init__.py")-${name:0:12}
    install_release "$name" "$maker"
    before=$(readlink -- "$opt/current" || true)
    if [[ $before != "releases/$name" ]]; then
        if [[ $before ]]; then point "$opt/previous" "$before"; fi
        point "$opt/current" "releases/$name"
    fi
    if [[ ,$extras, == *,local,* ]]; then
        run env XDG_CACHE_HOME="$root/var/cache" "$opt/current/bin/ai-ticket" fetch-model
    fi
    for unit in "${units[@]}"; do
        put 0644 "$checkout/etc/systemd/$unit" "$system/$unit" || true
    done
    [[ $start ]] || return 0
    control daemon-reload
    control enable --now ai-ticket.socket
    control enable ai-ticket.service
    # Waits until what is in flight has ended. Callers wait meanwhile, for the port stays open.
    wanted=$(wanted "releases/$name")
    if [[ $(cat -- "$opt/in-force" 2>/dev/null) == "$wanted" ]]; then
        control start ai-ticket.service
    else
        control restart ai-ticket.service
        write "$opt/in-force" "$wanted"
    fi
    prune_releases # not before, for the old one was running until now
    say "installed $name; settings: $etc/ai-ticket.env"
}

roll_back() {
    local current previous
    current=$(readlink -- "$opt/current" || true)
    previous=$(readlink -- "$opt/previous" || true)
    [[ $previous && -e $opt/$previous/installed ]] || die "there is no release before ${current:-it} in $opt"
    point "$opt/previous" "$current"
    point "$opt/current" "$previous"
    if [[ $start ]]; then
        control restart ai-ticket.service
        write "$opt/in-force" "$(wanted "$previous")"
    fi
    say "back to ${previous#releases/}; --rollback again returns to ${current#releases/}"
}

# uninstall PURGE
uninstall() {
    local unit
    if [[ -e $system/ai-ticket.service ]]; then control disable --now ai-ticket-http.socket ai-ticket.socket ai-ticket.service; fi
    for unit in "${units[@]}"; do run rm -f -- "$system/$unit"; done
    control daemon-reload
    run rm -rf -- "$opt" "$root"/var/{lib,cache}/{,private/}ai-ticket
    if [[ $1 ]]; then
        for unit in "${units[@]}"; do run rm -rf -- "$system/$unit.d"; done
        run rm -rf -- "$etc"
    elif [[ -e $etc ]]; then
        say "$etc is kept; --uninstall --purge removes it as well"
    fi
}

main() {
    local mode=install purge=''
    while (($#)); do
        case $1 in
        -h | --help)
            usage
            return
            ;;
        --dry-run) dry=yes ;;
        --no-start) start= ;;
        --rollback) mode=rollback ;;
        --uninstall) mode=uninstall ;;
        --purge) purge=yes ;;
        --root | --extras)
            (($# > 1)) || die "$1 needs a value"
            if [[ $1 == --root ]]; then root=${2%/}; else extras=$2 extras_given=yes; fi
            shift
            ;;
        *)
            usage >&2
            die "unknown argument: $1"
            ;;
        esac
        shift
    done
    umask 022 # or the service's user could not read the program
    [[ $mode == uninstall || ! $purge ]] || die '--purge goes with --uninstall'
    [[ $root || $dry || $EUID == 0 ]] || die 'this needs root (or --dry-run, or --root FOLDER)'
    opt=$root/opt/ai-ticket etc=$root/etc/ai-ticket system=$root/etc/systemd/system
    case $mode in
    install) install_all ;;
    rollback) roll_back ;;
    uninstall) uninstall "$purge" ;;
    esac
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    main "$@"
fi
