#!/usr/bin/env bash
# Three hosts on this machine: a launcher (10.77.0.1), a head (.10) and two workers (.11, .12), each with a network, processes,
# and files of its own (/root, /tmp, /run, /dev/shm), joined by a bridge; sshd on all but the launcher.
# Everything lies inside one set of namespaces and ends with this script.
#
#   lab.sh KEPT COMMAND…     KEPT: paths, joined by colons, that all hosts see as they are here
set -euo pipefail
if [ -z "${LAB:-}" ]; then
    LAB=$(mktemp -d /var/tmp/lab.XXXXXX)
    export LAB
    trap 'rm -rf --one-file-system "$LAB"' EXIT
    unshare --net --mount --uts --ipc --pid --fork --kill-child --mount-proc bash "$0" "$@"
    exit $?
fi
KEPT=$1
shift
export KEPT
mount --make-rprivate /
ip link set lo up
ip link add br0 type bridge
ip addr add 10.77.0.1/24 dev br0
ip link set br0 up
ssh-keygen -q -t ed25519 -N '' -f "$LAB/key"
ssh-keygen -q -t ed25519 -N '' -f "$LAB/hostkey"
cp /etc/passwd "$LAB/passwd"
grep -q '^sshd:' "$LAB/passwd" || echo 'sshd:x:999:65534::/run/sshd:/usr/sbin/nologin' >> "$LAB/passwd"

cat > "$LAB/own_files.sh" << 'OWN'  # NAME: private folders, with the kept paths put back into them
hostname "$1"
mkdir -p "$LAB/$1"
number=0
IFS=: read -ra kept <<< "$KEPT"
for path in "${kept[@]}"; do
    mkdir -p "$LAB/$1/$number"
    mount --rbind "$path" "$LAB/$1/$number"
    number=$((number + 1))
done
mount -t tmpfs -o mode=700 tmpfs /root
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t tmpfs -o mode=1777,size=1g tmpfs /dev/shm
mkdir -p /run/sshd /run/lock /root/.ssh
number=0
for path in "${kept[@]}"; do
    mkdir -p "$path"
    mount --rbind "$LAB/$1/$number" "$path"
    number=$((number + 1))
done
mount --bind "$LAB/passwd" /etc/passwd
cp "$LAB/key.pub" /root/.ssh/authorized_keys
ln -s "$VENV" /root/venv
OWN

cat > "$LAB/host.sh" << 'HOST'  # NAME ADDRESS: the first process of a host
set -eu
bash "$LAB/own_files.sh" "$1"
until ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip link set lo up
ip addr add "$2/24" dev eth0
ip link set eth0 up
ip route add default via 10.77.0.1
printf '%s\n' "ListenAddress $2" "HostKey $LAB/hostkey" "PidFile /run/sshd.pid" "UsePAM no" "StrictModes no" \
    "PermitRootLogin prohibit-password" "PasswordAuthentication no" "MaxStartups 50" > /run/sshd_config
touch "$LAB/$1.up"
exec /usr/sbin/sshd -D -e -f /run/sshd_config > "$LAB/$1.sshd.log" 2>&1
HOST

cat > "$LAB/start_host.sh" << 'START'  # NAME ADDRESS: also starts a host again that was killed
set -euo pipefail
rm -f "$LAB/$1.up"
unshare --net --mount --uts --ipc --pid --fork --kill-child --mount-proc bash "$LAB/host.sh" "$1" "$2" &
outer=$! inner=
until [ -n "$inner" ]; do
    inner=$(tr -d ' ' < "/proc/$outer/task/$outer/children" || true)
    sleep 0.05
done
until [ "$(readlink "/proc/$inner/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add "v$1" type veth peer name eth0 netns "$inner"
ip link set "v$1" master br0
ip link set "v$1" up
echo "$inner" > "$LAB/$1.pid"
until [ -e "$LAB/$1.up" ]; do sleep 0.05; done
START

# a small disk that outlives the head, as a cloud's volume does
mkdir "$LAB/disk"
mount -t tmpfs -o size=64m tmpfs "$LAB/disk"
bash "$LAB/start_host.sh" head 10.77.0.10
bash "$LAB/start_host.sh" worker1 10.77.0.11
bash "$LAB/start_host.sh" worker2 10.77.0.12
# the launcher is a host of its own too: `ray up` keeps its state in ~ and /tmp
unshare --mount --uts bash -c 'bash "$LAB/own_files.sh" launcher; exec "$@"' launcher "$@"
