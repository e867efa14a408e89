#!/bin/sh
# Builds the smallest root file system that a binary needs.
#
#   make_root.sh BINARY FOLDER      makes FOLDER/root and FOLDER/data
#
# The dynamic linker itself names the libraries, so a new dependency cannot be forgotten.
set -eu

binary=$1
root=$2/root
data=$2/data
mkdir -p "$root/etc/ssl/certs" "$data"
cp "$binary" "$root/prompt-service"

# Lines with a path: "libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x…)" and
# "/lib64/ld-linux-x86-64.so.2 (0x…)".
libraries=$(ldd "$binary")
case $libraries in
*"not found"*)
    echo "make_root: a library is missing: $libraries" >&2
    exit 1
    ;;
esac
echo "$libraries" | sed -n 's/^[^/]*\(\/[^ ]*\).*/\1/p' | while read -r library; do
    mkdir -p "$root$(dirname "$library")"
    # The file itself, not a link to it.
    cp -L "$library" "$root$library"
done

cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"

# The packages of these files, in the place where scanners look for known weaknesses in images
# without a package manager.
if command -v dpkg-query >/dev/null; then
    mkdir -p "$root/var/lib/dpkg/status.d"
    cp -L /etc/os-release "$root/etc/"
    {
        echo ca-certificates
        echo "$libraries" | sed -n 's/^[^/]*\(\/[^ ]*\).*/\1/p' | xargs dpkg-query --search | sed 's/:.*//'
    } | sort -u | while read -r package; do
        dpkg-query --status "$package" >"$root/var/lib/dpkg/status.d/$package"
    done
fi
# Without this file the C library asks name servers first. If they do not know a name, it does not
# look into /etc/hosts.
echo "hosts: files dns" >"$root/etc/nsswitch.conf"
# Names for the numeric owners of files; nobody can log in.
echo "prompt:x:65532:65532::/data:/prompt-service" >"$root/etc/passwd"
echo "prompt:x:65532:" >"$root/etc/group"
