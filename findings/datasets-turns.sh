#!/usr/bin/env bash
# datasets 5.2.0: the same conversations with tool calls become three different things, by the way they are loaded.
#
# Expected: rows of a JSON Lines file keep their content: load_dataset, Dataset.from_list, and a Parquet file written
#   from either and read by pyarrow all give the turns that were written.
# Happens: load_dataset("json") keeps each turn as it is, but stores it as JSON text: the Parquet file holds a list of
#   strings (type arrow.json), which readers other than datasets hand out as strings instead of turns. Dataset.from_list
#   makes structs with the keys of all rows: the call of `clock` then has the argument `city` of another row's call,
#   null, and a chat template writes it into the call that is learned.
# Seen: 30 November 2026, with pyarrow 26.0.1.
# Output, from which any difference ends this script with 1:
#> written:                 {'name': 'clock', 'arguments': {'zone': 'UTC'}}
#> load_dataset:            {'name': 'clock', 'arguments': {'zone': 'UTC'}}
#> its Parquet, by pyarrow: {"role":"assistant","tool_calls":[{"type":"function","function":{"name":"clock","arguments":{"zone":"UTC"}}}]}
#> Dataset.from_list:       {'name': 'clock', 'arguments': {'zone': 'UTC', 'city': None}}
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
sed -n 's/^#> //p' "$0" >"$directory/expected"
"${PYTHON:-python3}" -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cd "$directory"
export HF_HOME="$directory/cache" HF_HUB_OFFLINE=1
venv/bin/python - >seen <<'PROGRAM'
import json

import datasets
import pyarrow.parquet

datasets.disable_progress_bars()


def row(name, arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"messages": [{"role": "user", "content": "Now?"}, {"role": "assistant", "tool_calls": [call]}]}


def call_of(turns):
    return turns[1]["tool_calls"][0]["function"] if isinstance(turns[1], dict) else turns[1]


rows = [row("clock", {"zone": "UTC"}), row("weather", {"city": "Bern"})]
with open("rows.jsonl", "w") as file:
    file.writelines(json.dumps(one) + "\n" for one in rows)
loaded = datasets.load_dataset("json", data_files="rows.jsonl", split="train")
loaded.to_parquet("rows.parquet")
print("written:                ", call_of(rows[0]["messages"]))
print("load_dataset:           ", call_of(loaded[0]["messages"]))
print("its Parquet, by pyarrow:", call_of(pyarrow.parquet.read_table("rows.parquet").to_pylist()[0]["messages"]))
print("Dataset.from_list:      ", call_of(datasets.Dataset.from_list(rows)[0]["messages"]))
PROGRAM
cat seen
diff "$directory/expected" seen
