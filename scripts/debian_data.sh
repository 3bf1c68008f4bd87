#!/bin/sh
# Puts the Fashion-MNIST of Debian's package into folder $1, without root; fails where there is no apt.
set -eu
target=$(mkdir -p "$(dirname "$1")" && cd "$(dirname "$1")" && pwd)/$(basename "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get download dataset-fashion-mnist
dpkg -x dataset-fashion-mnist_*.deb .
mv usr/share/datasets/fashion-mnist "$target"
