#!/usr/bin/env bash
# libfaketime 0.9.10 (Debian 12) and CPython 3.11: with DONT_FAKE_MONOTONIC=1 a plain time.sleep raises.
#
# Expected: DONT_FAKE_MONOTONIC=1 leaves the monotonic clock alone, so that a server can be tested with a jumped wall clock
#   while its waits go on as they are; time.sleep waits.
# Happens: time.sleep(0.1) raises OSError(22, 'Invalid argument') at once. CPython 3.11 sleeps until an absolute time of the
#   monotonic clock (clock_nanosleep with TIMER_ABSTIME). Without the variable it sleeps, but then the monotonic clock is
#   faked as well, which is what a test of a jumping wall clock has to avoid. time.monotonic and threading waits are right.
# Seen: 30 November 2026.
# Output, from which any difference ends this script with 1:
#> wall clock two days ahead: sleeps
#> wall clock two days ahead, DONT_FAKE_MONOTONIC=1: OSError(22, 'Invalid argument')
#> the same, threading.Event().wait: waits
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
sed -n 's/^#> //p' "$0" >"$directory/expected"
cd "$directory"
apt-get download --quiet=2 libfaketime=0.9.10-2.1 2>apt-messages || { cat apt-messages; exit 1; }
dpkg -x libfaketime_*.deb unpacked
library=$(echo "$directory"/unpacked/usr/lib/*/faketime/libfaketimeMT.so.1)
under() { env LD_PRELOAD="$library" FAKETIME=+2d "$@"; }
cat >sleeps.py <<'PROGRAM'
import time

try:
    time.sleep(0.1)
    print("sleeps")
except OSError as error:
    print(repr(error))
PROGRAM
cat >waits.py <<'PROGRAM'
import threading

print("waits" if not threading.Event().wait(0.1) else "does not wait")
PROGRAM
{
    echo "wall clock two days ahead: $(under "${PYTHON:-python3.11}" sleeps.py)"
    echo "wall clock two days ahead, DONT_FAKE_MONOTONIC=1: $(under DONT_FAKE_MONOTONIC=1 "${PYTHON:-python3.11}" sleeps.py)"
    echo "the same, threading.Event().wait: $(under DONT_FAKE_MONOTONIC=1 "${PYTHON:-python3.11}" waits.py)"
} >seen
cat seen
diff expected seen
