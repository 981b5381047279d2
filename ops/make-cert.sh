#!/usr/bin/env bash
# Makes a self-signed certificate: see usage below. Kept to what bash 3.2 understands.
set -euo pipefail

ops=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)

usage() {
    cat <<'TEXT'
Usage: ops/make-cert.sh [--out FOLDER] [--days N] [--force] [NAME...]

Makes a self-signed certificate and its key for development, server.crt and server.key in FOLDER (ops/certs): for
localhost, 127.0.0.1, ::1, this machine's name, and each NAME, a host name (*.example.org too) or an IP address. A
caller trusts it as it is: curl --cacert FOLDER/server.crt.

  --days N  how long it is valid (825)
  --force   also where there is a certificate: a new one, with a new key. SIGHUP makes the running service use it

A key without a certificate is used and kept.
TEXT
}

die() {
    printf 'make-cert: %s\n' "$*" >&2
    exit 1
}

# alternative NAME: prints it as an entry of subjectAltName. Anything else would make openssl refuse them all.
alternative() {
    case $1 in
    *[!0-9a-fA-F:.]*) ;;
    *:*) printf 'IP:%s' "$1" && return ;;
    *[!0-9.]*) ;;
    *.*.*.*) printf 'IP:%s' "$1" && return ;;
    esac
    [[ $1 =~ ^(\*\.)?[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || return 1
    printf 'DNS:%s' "$1"
}

# make FOLDER DAYS SUBJECT_ALTERNATIVE_NAMES KEY: with this key, or a new one if there is no such file. What was there
# stays until all of it is made.
make() {
    local crt=$1/server.crt key=$4
    umask 077
    mkdir -p -- "$1"
    if [[ ! -e $key ]]; then
        key=$1/server.key.new
        openssl ecparam -name prime256v1 -genkey -noout -out "$key" || die "'openssl ecparam' failed, see above"
    fi
    # Not a certificate authority: who trusts it trusts this one service and no other.
    # The configuration is our own, since the system's differs from one to the next or is not there.
    cat >"$crt.conf" <<TEXT
[req]
prompt = no
distinguished_name = name
x509_extensions = extensions
[name]
CN = localhost
[extensions]
subjectAltName = $3
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
TEXT
    openssl req -x509 -new -sha256 -days "$2" -config "$crt.conf" -key "$key" -out "$crt.new" </dev/null ||
        die "'openssl req -x509' failed, see above"
    chmod 644 "$crt.new"
    if [[ $key == *.new ]]; then mv -- "$key" "$1/server.key"; fi
    mv -- "$crt.new" "$crt"
}

main() {
    folder=$ops/certs # not local: the trap below uses it
    local days=825 force='' name entry names=DNS:localhost,IP:127.0.0.1,IP:::1
    while (($#)); do
        case $1 in
        -h | --help)
            usage
            return
            ;;
        --out | --days)
            (($# > 1)) || die "$1 needs a value"
            if [[ $1 == --out ]]; then folder=$2; else days=$2; fi
            shift
            ;;
        --force) force=yes ;;
        -*) die "unknown option: $1" ;;
        *) break ;;
        esac
        shift
    done
    [[ $days =~ ^[1-9][0-9]{0,4}$ ]] || die "--days: not a number of days: $days"
    command -v openssl >/dev/null ||
        die "openssl is needed to make the certificate, and is missing. On Debian and Ubuntu: apt install openssl." \
            "Or put your own certificate and key in $folder/server.crt and server.key."
    for name; do
        entry=$(alternative "$name") || die "neither a host name nor an IP address: $name"
        names+=,$entry
    done
    name=$(uname -n)
    if [[ $name != localhost ]] && entry=$(alternative "$name"); then names+=,$entry; fi
    if [[ -e $folder/server.crt && ! $force ]]; then
        die "$folder/server.crt is there already; --force makes a new one"
    fi
    trap 'rm -f -- "$folder"/server.{key.new,crt.new,crt.conf}' EXIT
    make "$folder" "$days" "$names" "$folder/server.key${force:+.new}"
}

main "$@"
