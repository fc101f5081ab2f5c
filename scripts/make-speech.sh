#!/usr/bin/env bash
# Makes a Speech-Commands folder with Debian's espeak-ng: DIR/<keyword>/*.wav at 22.05 kHz, and testing_list.txt with
# the clips of voices that no training clip has.
#
#   scripts/make-speech.sh DIR [SPEEDS_AND_PITCHES]
#
# 14 keywords; 17 voices to train on and 6 others to test on, each at so many speeds and pitches (3 if not given).
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: make-speech.sh DIR [SPEEDS_AND_PITCHES]" >&2; exit 2; }
out=$1
takes=${2:-3}
command -v espeak-ng >/dev/null || { echo "make-speech: install espeak-ng first (apt-get install espeak-ng)" >&2; exit 1; }

keywords=(yes no up down left right on off stop go happy seven marvin wow)
train=(en-us+m1 en-us+m2 en-us+m3 en-us+m4 en-us+m5 en-us+f1 en-us+f2 en-us+f3 en-gb+m1 en-gb+m3 en-gb+m4 en-gb+f1 en-gb+f2
  en-gb+f4 en-gb-x-rp+m2 en-gb-x-rp+f3 en-us+croak)
test=(en-us+m7 en-us+f4 en-gb+m6 en-gb+f5 en-gb-scotland+m8 en-us+klatt2)

mkdir -p "$out"
: >"$out/testing_list.txt"
for keyword in "${keywords[@]}"; do
  mkdir -p "$out/$keyword"
  for voice in "${train[@]}" "${test[@]}"; do
    for ((take = 0; take < takes; take++)); do
      name="${voice//+/_}_$take.wav"
      # Speeds from 120 to 200 words a minute, pitches from 30 to 70.
      speed=$((120 + (take * 53 + ${#voice} * 17) % 80))
      pitch=$((30 + (take * 29 + ${#voice} * 11) % 40))
      espeak-ng -v "$voice" -s "$speed" -p "$pitch" -w "$out/$keyword/$name" "$keyword"
      case " ${test[*]} " in *" $voice "*) echo "$keyword/$name" >>"$out/testing_list.txt" ;; esac
    done
  done
done
echo "make-speech: $(find "$out" -name '*.wav' | wc -l) clips in $out"
