#!/usr/bin/env bash
# Makes what compose.yaml needs and no repository holds: passwords, tokens, certificates.
set -euo pipefail

if [[ ${1-} == --help || ${1-} == -h ]]; then
    echo "Usage: prepare.sh [FOLDER]"
    echo "Writes passwords, tokens and certificates for the compose file into FOLDER (default: secrets/ beside this script),"
    echo "which must not be there. Files that only the containers' user may read need root, to be given to it."
    exit 0
fi
(($# <= 1)) || { echo "error: prepare.sh takes one folder at most, got: $*" >&2; exit 2; }
folder=${1:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)/secrets}
[[ ! -e $folder ]] || { echo "error: $folder is there already; move it away to make other secrets" >&2; exit 1; }
umask 077
mkdir -p "$folder"
cd "$folder"

random() { openssl rand -hex 24; }

password=$(random) key=$(random) admin=fmt_$(random)
printf '%s' "$password" >database_password
printf 'database:5432:fedmoe:fedmoe:%s\n' "$password" >pgpass
printf '%s' "$(random)" >grafana_password
printf '%s\n' "$(random)" >replica
printf '%s' "$admin" >admin_token
printf 'FEDMOE_TOKEN=fmt_%s\nFEDMOE_ADMIN_TOKEN=%s\n' "$(random)" "$admin" >tokens.env
printf 'ROOT_ACCESS_KEY=fedmoe\nROOT_SECRET_KEY=%s\n' "$key" >objects.env
printf 'AWS_ACCESS_KEY_ID=fedmoe\nAWS_SECRET_ACCESS_KEY=%s\n' "$key" >blobs.env

# An authority of their own for the coordinators; workers trust it with SSL_CERT_FILE=ca.crt.
names=DNS:coordinator-a,DNS:coordinator-b,DNS:coordinator-c,DNS:balancer,DNS:localhost,IP:127.0.0.1
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 825 -subj "/CN=FedMoE" \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign \
    -keyout ca.key -out ca.crt 2>openssl.log
openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=coordinator" \
    -keyout tls.key -out tls.csr 2>>openssl.log
openssl x509 -req -in tls.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 825 \
    -extfile <(printf 'subjectAltName=%s\nauthorityKeyIdentifier=keyid\n' "$names") -out tls.crt 2>>openssl.log
rm -f tls.csr ca.srl openssl.log
chmod 644 ca.crt tls.crt

# The users of the containers, by number: FedMoE, PostgreSQL, nginx, Prometheus, Grafana.
give() {
    local user=$1
    shift
    ((EUID != 0)) || chown "$user" -- "$@"
}
cp tls.key balancer.key
give 10001 pgpass replica tls.key
give 999 database_password
give 101 balancer.key
give 65534 admin_token
give 472 grafana_password
((EUID == 0)) || echo "not root: give pgpass, replica, tls.key to user 10001, database_password to 999, balancer.key to 101," \
    "admin_token to 65534, grafana_password to 472" >&2
echo "made $folder; workers need the FEDMOE_TOKEN of tokens.env, and ca.crt"
