#!/bin/sh
# NVIDIA's entrypoint prepares the driver's forward compatibility, and prints a banner on standard output. That belongs to
# the command, whose --json is read by machines: so the banner goes to standard error.
exec 3>&1
exec "${NVIDIA_ENTRYPOINT:-/opt/nvidia/nvidia_entrypoint.sh}" sh -c 'exec repvgg-deploy "$@" >&3 3>&-' repvgg-deploy "$@" >&2
