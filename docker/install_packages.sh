#!/bin/sh
# Makes the CPU image's environment in the folder $1, from /requirements and /wheels: torch's CPU build by TORCH (its version)
# and TORCH_INDEX, EXTRAS, and all else at the versions and hashes of requirements/*.txt.
set -eu
folder=$1
python -m venv --without-pip "$folder"
install() {
    pip --python "$folder/bin/python" --quiet install "$@"
}

# Its builds differ from index to index, and so do their hashes. What it needs is in cpu.txt.
torch="torch==$TORCH+cpu"
install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch" || {
    echo "error: there is no CPU build $torch in ${TORCH_INDEX:-the indexes that pip is configured with}" >&2
    echo "hint: --build-arg TORCH_INDEX=<PyTorch's CPU wheel index>, whose address PyTorch's installation page gives" \
        "for pip and the CPU" >&2
    exit 1
}
for name in cpu $EXTRAS; do
    [ -f "/requirements/$name.txt" ] || {
        echo "error: there is no extra '$name' for the image; hint: EXTRAS takes pull, rtx and serve" >&2
        exit 1
    }
    install --require-hashes -r "/requirements/$name.txt"
done
install --no-deps /wheels/*.whl
pip --python "$folder/bin/python" check
