#!/bin/sh
# The first process of a machine, and the only one besides what it is asked to run. From the kernel's command line: CLONE, where the clone is.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
share=trans=virtio,version=9p2000.L,msize=512000

mount -t proc proc /proc
mount -t sysfs sysfs /sys
[ -e /dev/null ] || mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm
for folder in /tmp /run /var/tmp /dev/shm; do mount -t tmpfs tmpfs "$folder"; done
# The host's root shows the clone, unless it is in a folder that was covered just now.
[ -e "$CLONE/package.json" ] || { mkdir -p "$CLONE" && mount -t 9p -o ro,$share,cache=loose clone "$CLONE"; }
# What the tests leave there is the host's .tap/machines/<name>.
mount -t 9p -o $share,cache=none results "$CLONE/.tap"
# An addon that was built for the host is not looked at.
[ -z "$HIDE_BUILD" ] || mount -t tmpfs tmpfs "$CLONE/build"

# A process that dies by a signal says where, on the console.
echo 1 >/proc/sys/debug/exception-trace
cd "$CLONE" || exit
ports=$(echo /dev/vport*p1)
ports=${ports%1}
exec 5>"${ports}3"
echo started >&5
sh .tap/command.sh </dev/null >"${ports}1" 2>"${ports}2" 5>&-
echo "ended $?" >&5

if [ -n "$KEEP" ]; then
  echo "This is the machine's shell. $CLONE is read-only, .tap and /tmp are not. Leave with ^A x."
  while true; do setsid sh -c "exec sh -i <$KEEP >$KEEP 2>&1"; done
fi
while true; do sleep 1000; done
