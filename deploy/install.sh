#!/usr/bin/env bash
# Atoll on this host under systemd: install, upgrade, roll back, uninstall. Runs as root, from a clone or as
# /opt/atoll/current/install.sh. Packages come from where pip is told to look (PIP_INDEX_URL, PIP_NO_INDEX, PIP_FIND_LINKS).
#
#   /opt/atoll/releases/VERSION   a virtual environment, with the units and configuration rendered for this host
#   /opt/atoll/{current,previous} two of them
#   /etc/atoll                    cluster.toml, env/, secret (0600, the service user's)
set -euo pipefail

readonly HOME_DIR=/opt/atoll CONFIG_DIR=/etc/atoll UNIT_DIR=/etc/systemd/system CACHE_DIR=/var/cache/atoll
readonly TMPFILES=/etc/tmpfiles.d/atoll.conf LINK=/usr/local/bin/atoll ACCOUNT=atoll

usage() {
    cat <<'TEXT'
usage: deploy/install.sh --cluster F [--host NAME] [--secret-file F]
       deploy/install.sh --rollback
       deploy/install.sh --uninstall

Without --uninstall or --rollback: install this clone's version, or upgrade to it. Nothing is started or restarted.
  --cluster F      cluster TOML; without it that of the installed version
  --host NAME      which of the cluster's hosts this is (default: the one with this host's name or an address of it)
  --secret-file F  the cluster's secret, the same on every host (default: keep the installed one, else make a new one)
  --rollback       go back to the version, units and configuration before the last upgrade
  --uninstall      stop and remove everything that was installed

example, on the second host of a cluster:
  scp 10.77.0.1:/etc/atoll/secret secret
  deploy/install.sh --cluster deploy/clusters/two-hosts.toml --secret-file secret
TEXT
}

fail() { # one sentence, exit code 2: the input is wrong and nothing was changed
    echo "install.sh: $*" >&2
    exit 2
}

systemd_runs() { [[ -d /run/systemd/system ]]; }

manager() { # what a running systemd must be told; in an image that is being built there is none
    ! systemd_runs || systemctl "$@"
}

main() {
    local action=install cluster="" host="" secret=""
    while (($#)); do
        case $1 in
        --cluster | --host | --secret-file)
            (($# > 1)) || fail "$1 needs a value (see --help)"
            case $1 in --cluster) cluster=$2 ;; --host) host=$2 ;; *) secret=$2 ;; esac
            shift
            ;;
        --rollback) action=rollback ;;
        --uninstall) action=uninstall ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) fail "unknown option $1 (see --help)" ;;
        esac
        shift
    done
    ((EUID == 0)) || fail "must run as root"
    [[ $action == install || -z $cluster$host$secret ]] || fail "--$action takes no other option"
    "$action" "$cluster" "$host" "$secret"
}

install() {
    local cluster=$1 host=$2 secret=$3 clone version release tool
    clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    [[ -f $clone/pyproject.toml ]] || fail "$clone is no clone of Atoll, so there is nothing to install from it"
    for tool in python3 systemctl systemd-tmpfiles useradd; do
        type -P "$tool" >/dev/null || fail "$tool is not installed"
    done
    python3 -c 'import ensurepip, venv' 2>/dev/null || fail "python3 cannot make virtual environments: apt-get install python3-venv"
    : "${cluster:=$CONFIG_DIR/cluster.toml}"
    [[ -f $cluster ]] || fail "cluster TOML $cluster: no such file (--cluster)"
    [[ -z $secret || -f $secret ]] || fail "secret file $secret: no such file"
    [[ -z $host && -f $CONFIG_DIR/host ]] && host=$(<"$CONFIG_DIR/host")
    version=$(version_of "$clone")
    release=$HOME_DIR/releases/$version
    build "$clone" "$release"
    "$release/bin/atoll" render systemd --cluster "$cluster" --out "$release/rendering.new" >/dev/null
    host=$(choose_host "$release/rendering.new" "$host")
    rm -rf "$release/rendering"
    mv "$release/rendering.new" "$release/rendering"
    echo "$host" >"$release/host"

    id "$ACCOUNT" >/dev/null 2>&1 ||
        useradd --system --user-group --home-dir "$CACHE_DIR" --no-create-home --shell /usr/sbin/nologin "$ACCOUNT"
    mkdir -p "$CONFIG_DIR"
    put_secret "$secret" "$release/rendering"
    if [[ -L $HOME_DIR/current && $(readlink "$HOME_DIR/current") != "$release" ]]; then
        ln -sfnT "$(readlink "$HOME_DIR/current")" "$HOME_DIR/previous"
    fi
    activate "$release"
    prune
    echo "atoll $version is installed for host $host"
    ! systemd_runs || if systemctl --quiet is-active atoll.target; then
        echo "the old version runs until: systemctl restart atoll.target"
    else
        echo "start it with: systemctl start atoll.target"
    fi
}

rollback() {
    [[ -L $HOME_DIR/previous ]] || fail "there is no version to go back to"
    local release current
    release=$(readlink "$HOME_DIR/previous")
    current=$(readlink "$HOME_DIR/current")
    activate "$release"
    ln -sfnT "$current" "$HOME_DIR/previous"
    echo "atoll ${release##*/} is installed again; systemctl restart atoll.target makes it run"
}

uninstall() {
    [[ -e $HOME_DIR || -e $CONFIG_DIR ]] || fail "Atoll is not installed"
    local run_dir=""
    [[ ! -f $TMPFILES ]] || run_dir=$(awk '$1 == "d" {print $2}' "$TMPFILES")
    manager stop atoll.target 'atoll-*'
    remove_units
    manager reset-failed 'atoll*'
    rm -rf "$HOME_DIR" "$CONFIG_DIR" "$CACHE_DIR" /var/log/atoll-mps "$TMPFILES" "$LINK" "$UNIT_DIR"/atoll.target.d "$UNIT_DIR"/atoll-*.d
    [[ -z $run_dir ]] || rm -rf "$run_dir"
    rm -rf ~/.cache/atoll # what root's own commands compiled
    [[ ! -d ~/.cache ]] || rmdir --ignore-fail-on-non-empty ~/.cache
    ! id "$ACCOUNT" >/dev/null 2>&1 || userdel "$ACCOUNT"
    echo "atoll is uninstalled"
}

version_of() { # of a clone: what git calls it, else the package's version
    git -C "$1" -c safe.directory="$1" describe --always --dirty 2>/dev/null ||
        sed -n 's/^version = "\(.*\)"$/\1/p' "$1/pyproject.toml"
}

build() { # CLONE RELEASE: a virtual environment, unless that version is there already
    local clone=$1 release=$2 source
    [[ ! -f $release/complete || $release == *-dirty ]] || return 0
    [[ $(readlink -f "$HOME_DIR/current") != "$release" ]] || fail "${release##*/} is installed and runs from $release: commit first"
    rm -rf "$release"
    mkdir -p "$release"
    python3 -m venv "$release"
    # torch first and alone, as in the Makefile
    pip_install "$release" "$(grep -x 'torch==[0-9.]*' "$clone/constraints.txt")"
    # from a copy: building leaves files behind and picks up those of earlier builds
    source=$(mktemp -d)
    (cd "$clone" && cp -r pyproject.toml README.md common kernels services deploy loadgen "$source")
    pip_install "$release" --constraint "$clone/constraints.txt" "$source"
    rm -rf "$source"
    cp "$clone/deploy/restart-backoff" "$release/bin/"
    cp "$clone/deploy/install.sh" "$release/"
    touch "$release/complete"
}

pip_install() {
    "$1/bin/pip" --disable-pip-version-check --quiet install --no-cache-dir "${@:2}" ||
        fail "pip could not install ${*: -1} into $1"
}

choose_host() { # RENDERING NAME: the folder of this host in the rendering
    local candidate names
    names=$(cd "$1" && printf '%s ' */)
    names=${names//\/}
    # shellcheck disable=SC2046
    for candidate in ${2:-$(hostname) $(hostname -I) $( [[ $(wc -w <<<"$names") != 1 ]] || echo "$names")}; do
        if [[ -d $1/$candidate ]]; then
            echo "$candidate"
            return
        fi
    done
    fail "this host is ${2:-"$(hostname), $(hostname -I)"}, the cluster's hosts are $names(--host)"
}

put_secret() { # FILE RENDERING: one that the TOML has elsewhere is the operator's
    local target=$CONFIG_DIR/secret wanted
    wanted=$(sed -n 's/^secret_file = "\(.*\)"$/\1/p' "$2/cluster.toml")
    if [[ $wanted != "$target" ]]; then
        [[ -z $1 ]] || fail "--secret-file is for $target, but the cluster's secret_file is $wanted"
        return
    fi
    umask 077
    if [[ -n $1 ]]; then
        [[ $1 -ef $target ]] || cp "$1" "$target.new"
    elif [[ ! -f $target ]]; then
        python3 -c 'import secrets; print(secrets.token_hex(32))' >"$target.new"
        echo "made a new cluster secret: every other host needs a copy of $target (--secret-file)"
    fi
    umask 022
    if [[ -f $target.new ]]; then
        chown "$ACCOUNT:$ACCOUNT" "$target.new"
        chmod 600 "$target.new"
        mv "$target.new" "$target"
    fi
}

activate() { # RELEASE: its units, configuration and commands become those of this host
    local release=$1 host rendering=$1/rendering
    host=$(<"$release/host")
    remove_units
    ln -sfnT "$release" "$HOME_DIR/current"
    ln -sfn "$HOME_DIR/current/bin/atoll" "$LINK"
    ln -sfnT "$("$release/bin/python" -I -c 'from deploy.local.models import DEMO_MODEL as m; print(m)')" "$HOME_DIR/demo-model"
    rm -rf "$CONFIG_DIR/env"
    cp -r "$rendering/$host/env" "$rendering/cluster.toml" "$CONFIG_DIR/"
    echo "$host" >"$CONFIG_DIR/host"
    cp "$rendering"/*.service "$rendering"/*.target "$UNIT_DIR/"
    cp "$rendering/tmpfiles.conf" "$TMPFILES"
    systemd-tmpfiles --create "$TMPFILES"
    manager daemon-reload
    grep -v '^#' "$rendering/$host/enable" | xargs systemctl --quiet enable
}

remove_units() {
    rm -rf "$UNIT_DIR"/atoll*.target.wants "$UNIT_DIR"/*.wants/atoll.target
    rm -f "$UNIT_DIR"/atoll.target "$UNIT_DIR"/atoll-*.service "$UNIT_DIR"/atoll-*.target
    manager daemon-reload
}

prune() { # what is neither current nor previous
    local release
    for release in "$HOME_DIR"/releases/*; do
        [[ $release == "$(readlink "$HOME_DIR/current")" || $release == "$(readlink "$HOME_DIR/previous")" ]] ||
            rm -rf "$release"
    done
}

main "$@"
