#!/usr/bin/env bash
# A SLURM cluster of two nodes on this machine, for tests: real daemons, and nodes that can lose power or their cable.
#   tests/slurm/two-nodes.sh [--root DIR] [--cpus C] [--gpus G] COMMAND
#     install            apt-get install slurm-wlm munge iproute2 where they are missing
#     start              bring up what is down (safe to repeat) and wait until both nodes take jobs
#     env                lines for the shell:  eval "$(tests/slurm/two-nodes.sh env)"; then sbatch, srun, squeue work
#     status             daemons, nodes, jobs
#     exec N COMMAND     run something inside node N
#     node-down N [HOW]  power (default): all its processes die; net: only the link is cut; slurmd: only that dies
#     node-up N          mend it, whatever was done to it
#     stop               end everything; DIR/log stays
#     clean              stop, and remove DIR
# Defaults: --root ./.slurm --cpus 2 --gpus 0. Cores and GPUs are claimed, not there: more cores than the machine has
# will do, and a GPU is only a number in CUDA_VISIBLE_DEVICES. Root and Linux only; systemd is not needed.

# A node is a set of namespaces (network, mounts, host name, processes) with a slurmd; a bridge leads to slurmctld
# outside. Files, /tmp too, are shared. All that is written lies below DIR, and only what DIR/run names is ever killed.
set -euo pipefail

fail() { echo "two-nodes: $*" >&2; exit 1; }
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

root=./.slurm cpus=2 gpus=0
while [[ ${1:-} == -* ]]; do
  case $1 in
    --root | --cpus | --gpus) [ $# -ge 2 ] || fail "$1 needs a value"; printf -v "${1#--}" %s "$2"; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) fail "no option $1" ;;
  esac
done
command=${1:-}
[ -n "$command" ] || { usage >&2; exit 2; }
shift
root=$(realpath -m "$root")
# Another root has another subnet (of those set aside for benchmarks, RFC 2544), other ports and other links.
id=$(($(cksum <<<"$root" | cut -d' ' -f1) % 200 + 20))
subnet=198.18.$id
export SLURM_CONF=$root/slurm.conf

# ---- processes, named by files in DIR/run ----

# until_true SECONDS COMMAND...
until_true() {
  local tries=$(($1 * 10))
  shift
  until "$@"; do
    ((tries-- > 0)) || return 1
    sleep 0.1
  done
}
# running FILE NAME: the file's pid is alive and that program. A daemon that nobody reaps still answers `kill -0`.
running() {
  local pid status
  pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && status=$(cat "/proc/$pid/status" 2>/dev/null) || return 1
  [[ $status == Name:*([[:space:]])"$2"$'\n'* && $status != *State:*([[:space:]])Z* ]]
}
gone() { ! running "$@"; }
# end FILE NAME: TERM, and KILL after ten seconds.
end() {
  if running "$1" "$2"; then
    kill -TERM "$(cat "$1")"
    until_true 10 gone "$1" "$2" || kill -KILL "$(cat "$1")"
  fi
  rm -f "$1"
}

# ---- set-up ----

install() {
  local program
  for program in slurmctld slurmd srun munged ip; do
    command -v "$program" >/dev/null || {
      [ "$(id -u)" = 0 ] || fail "$program is missing, and only root can install it"
      export DEBIAN_FRONTEND=noninteractive
      apt-get -qq -o DPkg::Lock::Timeout=300 update
      # RUNLEVEL=1: the packages' own services are not started.
      RUNLEVEL=1 apt-get -qqy -o DPkg::Lock::Timeout=300 install --no-install-recommends \
        slurm-wlm munge iproute2 >/dev/null
      return
    }
  done
}
configure() {
  mkdir -p "$root"/{run,log,munge,state,spool/n1,spool/n2}
  chmod 755 "$root" "$root/munge"
  printf '%s\n' "127.0.0.1 localhost" "$subnet.1 $(hostname -s)" "$subnet.11 n1" "$subnet.12 n2" >"$root/hosts"
  # There is no name server behind the bridge, and torch's store looks its clients up backwards: seconds each.
  { sed '/^hosts:/d' /etc/nsswitch.conf; echo 'hosts: files'; } >"$root/nsswitch.conf"
  local gres="" number
  : >"$root/gres.conf"
  if [ "$gpus" -gt 0 ]; then
    gres="Gres=gpu:$gpus"
    for ((number = 10; number < 10 + gpus; number++)); do echo "Name=gpu File=/dev/tty$number"; done >"$root/gres.conf"
  fi
  : >"$root/cgroup.conf"
  cat >"$SLURM_CONF" <<CONF
ClusterName=twonodes
SlurmctldHost=$(hostname -s)($subnet.1)
SlurmctldPort=$((17000 + id))
SlurmdPort=$((17300 + id))
SlurmUser=root
SlurmdUser=root
# No job id comes twice, neither after a new start nor from another root.
FirstJobId=$((id * 250000 + $(date +%s) % 250000))
AuthType=auth/munge
# A requeued job waits until its old credential has expired, two minutes by default.
AuthInfo=socket=$root/munge/socket,cred_expire=5
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool/%n
SlurmctldPidFile=$root/run/slurmctld
SlurmdPidFile=$root/run/slurmd.%n
SlurmctldLogFile=$root/log/slurmctld
SlurmdLogFile=$root/log/slurmd.%n
# Without cgroups, which a container does not grant.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
# Ended jobs stay known for a day: there is no accounting to ask.
MinJobAge=86400
# Nobody wants to wait minutes in a test.
KillWait=5
SlurmdTimeout=15
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=10
ReturnToService=2
NodeName=n1 NodeHostname=n1 NodeAddr=$subnet.11 CPUs=$cpus RealMemory=8000 $gres
NodeName=n2 NodeHostname=n2 NodeAddr=$subnet.12 CPUs=$cpus RealMemory=8000 $gres
PartitionName=main Nodes=n[1-2] Default=YES PriorityTier=10 DefaultTime=5 MaxTime=60 PreemptMode=OFF
PartitionName=low Nodes=n[1-2] PriorityTier=1 DefaultTime=5 MaxTime=60 GraceTime=10
CONF
}
controller_answers() { [[ $(scontrol ping 2>/dev/null) == *UP* ]]; }
start_controller() {
  if ! running "$root/run/munged" munged; then
    (umask 077 && [ -s "$root/munge/key" ] || head -c 128 /dev/urandom >"$root/munge/key")
    # --force: munged dislikes folders that a group may write, as a checkout's often are; the key must be the owner's.
    munged --force --socket="$root/munge/socket" --key-file="$root/munge/key" --seed-file="$root/munge/seed" \
      --pid-file="$root/run/munged" --log-file="$root/log/munged" 2>>"$root/log/munged" ||
      fail "munged: see $root/log/munged"
  fi
  ip link show "seer$id" >/dev/null 2>&1 || {
    ip link add "seer$id" type bridge
    ip addr add "$subnet.1/24" dev "seer$id"
    ip link set "seer$id" up
  }
  running "$root/run/slurmctld" slurmctld || slurmctld </dev/null >>"$root/log/slurmctld" 2>&1 || true
  until_true 15 controller_answers || fail "slurmctld: see $root/log/slurmctld"
}

# ---- nodes ----

init() { cat "$root/run/n$1"; }
powered() { running "$root/run/n$1" bash; }
inside() { nsenter --target "$(init "$1")" --net --mount --uts --pid -- "${@:2}"; }
# slurmd's pid counts inside the node.
has_slurmd() {
  powered "$1" && [ -s "$root/run/slurmd.n$1" ] &&
    [[ $(inside "$1" cat "/proc/$(cat "$root/run/slurmd.n$1")/comm" 2>/dev/null) == slurmd ]]
}
lacks_slurmd() { ! has_slurmd "$1"; }

power_on() {
  local n=$1 outer
  powered "$n" && return
  rm -f "$root/run/n$n"*
  # The node's first process: when it is killed, the kernel kills every other one of the node. It also reaps orphans.
  # shellcheck disable=SC2016 # it expands there
  setsid unshare --net --mount --uts --pid --fork --kill-child --mount-proc --propagation private bash -euc '
    hostname "n$1"
    mount --bind "$2/hosts" /etc/hosts
    mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    ip link set lo up
    touch "$2/run/n$1.ready"
    set +e
    while :; do sleep 600 & wait $!; done' init "$n" "$root" </dev/null >>"$root/log/n$n" 2>&1 &
  outer=$!
  until_true 10 test -e "$root/run/n$n.ready" || { kill -KILL $outer; fail "namespaces of n$n: see $root/log/n$n"; }
  cut -d' ' -f1 "/proc/$outer/task/$outer/children" >"$root/run/n$n"
  ip link add "seer$id.$n" type veth peer name eth0 netns "$(init "$n")"
  ip link set "seer$id.$n" master "seer$id"
  inside "$n" ip addr add "$subnet.$((10 + n))/24" dev eth0
  inside "$n" ip link set eth0 up
}
start_slurmd() {
  has_slurmd "$1" && return
  inside "$1" env -i PATH="$PATH" SLURM_CONF="$SLURM_CONF" slurmd -N "n$1" </dev/null >>"$root/log/slurmd.n$1" 2>&1 ||
    fail "slurmd: see $root/log/slurmd.n$1"
}
kill_slurmd() {
  has_slurmd "$1" || return 0
  inside "$1" kill -KILL "$(cat "$root/run/slurmd.n$1")"
  until_true 5 lacks_slurmd "$1"
  rm -f "$root/run/slurmd.n$1"
}
power_off() {
  if powered "$1"; then
    kill -KILL "$(init "$1")"
    until_true 10 gone "$root/run/n$1" bash
  fi
  ip link del "seer$id.$1" 2>/dev/null || true
  rm -f "$root/run/n$1"* "$root/run/slurmd.n$1"
}
takes_jobs() {
  case $(sinfo -h -N -n "n$1" -p main -o %T 2>/dev/null) in
    idle | mixed | allocated | completing) ;;
    # A node that could not end a job in time waits for an administrator.
    down | drained) scontrol update nodename="n$1" state=resume 2>/dev/null; return 1 ;;
    *) return 1 ;;
  esac
}
bring_up() {
  power_on "$1"
  ip link set "seer$id.$1" up
  start_slurmd "$1"
}
# slurmctld hears of the end of a job only from the slurmd that ended it: a new slurmd in a whole node, started at that
# moment, leaves the job "completing" until slurmctld asks again after a minute.
whole() { has_slurmd "$1" && [[ $(ip link show "seer$id.$1") == *,UP* ]] && takes_jobs "$1"; }
await() { until_true 40 takes_jobs "$1" || fail "n$1 takes no jobs: $(sinfo -h -N -n "n$1" -p main -o '%T %E')"; }
node() {
  n=${1#n}
  [[ $n == [12] ]] || fail "${1:-no node}: the nodes are 1 and 2"
}
stop() {
  if running "$root/run/slurmctld" slurmctld; then
    timeout 10 scancel --full --signal=KILL --user=root 2>/dev/null || true # ends an srun or sbatch --wait outside too
  fi
  power_off 1
  power_off 2
  end "$root/run/slurmctld" slurmctld
  end "$root/run/munged" munged
  ip link del "seer$id" 2>/dev/null || true
  rm -rf "$root"/{run,state,spool,munge}
}

case $command in
  start | stop | clean | node-down | node-up | exec)
    [ "$(id -u)" = 0 ] || fail "namespaces and daemons need root"
    # What is removed later was made here.
    [[ -f $SLURM_CONF || -z $(ls -A "$root" 2>/dev/null) ]] || fail "$root is not empty, and is no cluster's folder"
    ;;
esac
case $command in
  install) install ;;
  start)
    # Paths of unix sockets end at 107 characters, and SLURM's are the longest below DIR.
    [[ ${#root} -le 70 && $root != *[[:space:]]* ]] || fail "--root $root: at most 70 characters, no white space"
    install
    running "$root/run/slurmctld" slurmctld || configure
    start_controller
    bring_up 1
    bring_up 2
    await 1
    await 2
    ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  status)
    for name in munged slurmctld; do running "$root/run/$name" "$name" && echo "$name up" || echo "$name down"; done
    for n in 1 2; do
      powered "$n" && echo "n$n on, slurmd $(has_slurmd "$n" && echo up || echo down)" || echo "n$n off"
    done
    ! controller_answers || { sinfo -N -o '%N %P %T %E'; squeue -o '%i %j %T %r %N %M'; }
    ;;
  exec)
    node "${1:-}"
    inside "$n" "${@:2}"
    ;;
  node-down)
    node "${1:-}"
    case ${2:-power} in
      power) power_off "$n" ;;
      net) ip link set "seer$id.$n" down ;;
      slurmd) kill_slurmd "$n" ;;
      *) fail "node-down $n $2: power, net or slurmd" ;;
    esac
    ;;
  node-up)
    node "${1:-}"
    # slurmctld looks at a lost node again only after a long while; a new slurmd introduces itself, and ends what still
    # runs there of jobs that went on elsewhere.
    whole "$n" || {
      kill_slurmd "$n"
      bring_up "$n"
      await "$n"
    }
    ;;
  stop) stop ;;
  clean)
    stop
    rm -rf "${root:?}"
    ;;
  *) fail "no command $command: see --help" ;;
esac
