#!/usr/bin/env bash
# A night's work on a folder of photos: look what is wrong in it, train on what is clean, measure, label new photos.
#
# command   recipes/nightly.sh PHOTOS NEW NIGHTS [OPTION...]
#           PHOTOS: labelled photos, as for tlkit finetune; NEW: a folder of photos to label; NIGHTS: a folder that gets
#           one for each night; OPTION: of tlkit finetune, such as --strategy probe or --recipe mine.yaml
# expected  NIGHTS/DATE-TIME/ with labels.csv, run/ (the network, report.html), clean.csv (what was trained on; beside it
#           what was left out), the JSON object of each command, log.txt; one line on stdout
# time      that of tlkit finetune, and some seconds for each of the other commands
# needs     Linux: flock and setsid of util-linux. Another tlkit than that of PATH: TLKIT=/path/to/tlkit
# source    tlkit check-data, finetune, evaluate and predict --help; recipes/nightly.cron starts it every night
#
# A night that was stopped (Ctrl-C, SIGTERM, a power cut) is gone on with by the next one, with the options that it began
# with. Two never run at once.
# Exit codes: 0 done; 1 a mistake in input or data, or another night is at work; 2 usage; 130 interrupted, 143 terminated.
set -euo pipefail

tlkit=${TLKIT:-tlkit}

main() {
  (($# >= 3)) || end 2 "usage: nightly.sh PHOTOS NEW NIGHTS [OPTION of tlkit finetune ...]"
  command -v "$tlkit" > /dev/null || end 1 "$tlkit: not found; put its folder into PATH, or give TLKIT=/path/to/tlkit"
  local photos=$1 new=$2 nights=$3
  shift 3
  [[ -e $photos ]] || end 1 "$photos: does not exist; give a folder of class folders"
  [[ -d $new ]] || end 1 "$new: is not a folder; give one with photos to label"
  mkdir -p "$nights" || end 1 "$nights: cannot be written; give another folder"
  exec 9> "$nights/.lock"
  flock --nonblock 9 || end 1 "$nights: another night is still at work there; wait, or stop it"
  trap 'stop 130' INT
  trap 'stop 143' TERM HUP

  night=$(begun "$nights")
  if [[ -z $night ]]; then
    night=$nights/$(date +%Y%m%d-%H%M%S)
    mkdir "$night"
  fi
  if todo check-data; then
    rm -f "$night"/clean.csv*
    step check-data check-data "$photos" --write-manifest "$night/clean.csv"
  fi
  if todo finetune; then
    if [[ -f $night/run/recipe.yaml ]]; then # from here on a run can be gone on with
      step finetune finetune --resume "$night/run"
    else
      rm -rf "$night/run"
      step finetune finetune "$night/clean.csv" --test-fraction 0.2 --out "$night/run" "$@"
    fi
  fi
  if todo evaluate; then
    step evaluate evaluate "$night/run"
  fi
  if todo predict && [[ -n $(find "$new" -type f -print -quit) ]]; then # an empty folder is no mistake
    rm -f "$night"/labels.csv*
    step predict predict "$night/run" "$new" --out "$night/labels.csv"
  fi
  echo 0 > "$night/exit-code"
  local top1
  top1=$(grep -o '"top1": [0-9.]*' "$night/evaluate.json" | head -n 1)
  echo "$night: done, top-1 ${top1:8:5}"
}

# The last night that has not ended, if any.
begun() {
  local folder last=
  for folder in "$1"/[0-9]*-[0-9]*/; do
    if [[ -d $folder && ! -f $folder/exit-code ]]; then last=${folder%/}; fi
  done
  echo "$last"
}

# Whether a step of this night is still to be done.
todo() {
  [[ ! -f $night/$1.json ]]
}

# step NAME WORD...: runs tlkit WORD... and keeps its JSON object as NAME.json. In a session of its own, so that a signal
# to all processes of a terminal or a batch system reaches it once, through stop.
step() {
  local name=$1 code=0
  shift
  echo "$(date '+%F %T') tlkit $*" >> "$night/log.txt"
  setsid "$tlkit" "$@" --json > "$night/$name.part" 2>> "$night/log.txt" &
  wait $! || code=$?
  case $code in
    0) mv "$night/$name.part" "$night/$name.json" ;;
    1 | 2) # the next night starts anew
      mv "$night/$name.part" "$night/$name.json"
      echo "$code" > "$night/exit-code"
      end "$code" "$(tail -n 1 "$night/log.txt")"
      ;;
    130 | 143) end "$code" "$night: stopped; the next night goes on with it" ;;
    *) end 1 "$night: tlkit $name ended with $code; the next night goes on with it; see $night/log.txt" ;;
  esac
}

# stop CODE: lets tlkit save its state, and ends. The next night goes on.
stop() {
  local children
  trap '' INT TERM HUP
  children=$(jobs -pr)
  if [[ -n $children ]]; then
    kill -TERM "$children" || true
    wait "$children" || true
  fi
  end "$1" "$night: stopped; the next night goes on with it"
}

# end CODE WORDS: says why, and ends.
end() {
  echo "nightly.sh: $2" >&2
  exit "$1"
}

main "$@"
