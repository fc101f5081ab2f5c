#!/usr/bin/env bash
# Makes a Speech-Commands folder with Debian's espeak-ng: DIR/<keyword>/*.wav at 22.05 kHz, and testing_list.txt and
# validation_list.txt with the clips of voices that no training clip has.
#
#   scripts/make-speech.sh DIR [SPEEDS_AND_PITCHES]
#
# 14 keywords; 48 voices to train on, 3 others for validation and 6 to test on, each at so many speeds and pitches (3 if
# not given).
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: make-speech.sh DIR [SPEEDS_AND_PITCHES]" >&2; exit 2; }
out=$1
takes=${2:-3}
[[ $takes =~ ^[1-9][0-9]*$ ]] || { echo "make-speech: $takes speeds and pitches, expected at least 1" >&2; exit 2; }
command -v espeak-ng >/dev/null || { echo "make-speech: install espeak-ng first (apt-get install espeak-ng)" >&2; exit 1; }

keywords=(yes no up down left right on off stop go happy seven marvin wow)
train=(en-us+m1 en-us+m2 en-us+m3 en-us+m4 en-us+m5 en-us+f1 en-us+f2 en-us+f3 en-gb+m1 en-gb+m3 en-gb+m4 en-gb+f1 en-gb+f2
  en-gb-x-rp+m2 en-gb-x-rp+f3 en-us+croak en-gb-scotland+m2 en-gb-scotland+f1 en-us+klatt en-gb+klatt3 en-us+klatt4
  en-us+adam en-gb+anika en-us+antonio en-gb+aunty en-us+belinda en-gb+benjamin en-us+boris en-gb+caleb en-us+david en-gb+ed
  en-us+edward en-gb+gustave en-us+john en-gb+linda en-us+max en-gb+michel en-us+paul en-gb+pedro en-us+quincy en-gb+rob
  en-us+robert en-gb+shelby en-us+steph en-gb+travis en-us+victor en-gb+zac en-us+Alicia)
validation=(en-us+m6 en-gb+m2 en-us+f5)
test=(en-us+m7 en-us+f4 en-gb+m6 en-gb+f5 en-gb-scotland+m8 en-us+klatt2)

# The lists of another folder are not for us to replace: its clips would be trained on.
for list in testing_list.txt validation_list.txt; do
  if [ -e "$out/$list" ]; then
    ours=$(printf '%s\n' "${test[@]//+/_}" "${validation[@]//+/_}" | paste -sd '|' -)
    found=0
    other=$(grep -vE -m 1 "^([a-z]+/($ours)_[0-9]+\.wav)?$" "$out/$list") || found=$?
    if [ "$found" -ne 1 ]; then # 1: every line is ours
      echo "make-speech: $out/$list names '$other', which is not from here: choose another folder" >&2
      exit 2
    fi
  fi
done
mkdir -p "$out"
: >"$out/testing_list.txt"
: >"$out/validation_list.txt"

speak() { # keyword, voice, take
  # Speeds from 120 to 200 words a minute, pitches from 30 to 70.
  local speed=$((120 + ($3 * 53 + ${#2} * 17) % 80)) pitch=$((30 + ($3 * 29 + ${#2} * 11) % 40))
  name="${2//+/_}_$3.wav"
  espeak-ng -v "$2" -s "$speed" -p "$pitch" -w "$out/$1/$name" "$1"
}

listed() { # keyword, list, voices whose clips are on it
  local keyword=$1 list=$2 voice take
  shift 2
  for voice; do
    for ((take = 0; take < takes; take++)); do
      speak "$keyword" "$voice" "$take"
      echo "$keyword/$name" >>"$out/$list"
    done
  done
}

for keyword in "${keywords[@]}"; do
  mkdir -p "$out/$keyword"
  # What an earlier call left of these voices is not on the new list, and would be trained on.
  for voice in "${train[@]}" "${validation[@]}" "${test[@]}"; do
    rm -f "$out/$keyword/${voice//+/_}"_*.wav
  done
  for voice in "${train[@]}"; do
    for ((take = 0; take < takes; take++)); do
      speak "$keyword" "$voice" "$take"
    done
  done
  listed "$keyword" validation_list.txt "${validation[@]}"
  listed "$keyword" testing_list.txt "${test[@]}"
done
echo "make-speech: $(find "$out" -name '*.wav' | wc -l) clips in $out"
