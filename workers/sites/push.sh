# How a job tells the platform that it has started, how far it is, and that it has ended. Run by bash on the job's first
# node, beside its program, which it may neither harm nor hold up: all it says is a hint, and nothing relies on it.
#
#   push.sh watch FOLDER URL PID   says "start", then what stands in FOLDER/progress whenever that changes, and now and
#                                  then that the job is alive, until the process PID is gone
#   push.sh end FOLDER URL CODE    says that the program has ended with this exit code
#
# FOLDER/secret (mode 0600) is a configuration of curl with the one header that only this job can send: so the secret
# stands on no command line and in no environment.

what=$1 folder=$2 url=$3 more=$4
look_s=2           # between two looks at the progress
heartbeat_s=60     # the longest time without a word
soon_s=0.2         # before the end is said again
early_s=0.5        # before the start is said again to a platform that does not know the job yet
early_tries=6      # so often; then at every look
start_tries=40
connect_s=1        # to connect
answer_s=2         # to connect and be answered
end_s=3            # from when on the end is not said again; at once where the platform was away before
text_bytes=500

in_python='
import sys, urllib.error, urllib.request

class Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *told):
        return None

secret, url, seconds = sys.argv[1:]
name, _, value = open(secret).read().split("\"")[1].partition(": ")
headers = {name: value, "Content-Type": "text/plain"}
request = urllib.request.Request(url, data=sys.stdin.buffer.read(), headers=headers)
try:
    with urllib.request.build_opener(Stay).open(request, timeout=float(seconds)) as answer:
        print(answer.status)
except urllib.error.HTTPError as error:
    print(error.code)
except Exception:
    print("000")
'

# Say one thing, with the text on stdin. Prints the HTTP status, 000 where there was no answer.
ask() {
  if command -v curl >/dev/null 2>&1; then
    curl --disable --silent --output /dev/null --write-out '%{http_code}' --config "$folder/secret" \
      --connect-timeout "$connect_s" --max-time "$answer_s" --header 'Content-Type: text/plain' \
      --data-binary @- "$url?$1"
  elif command -v python3 >/dev/null 2>&1; then
    python3 -I -c "$in_python" "$folder/secret" "$url?$1" "$answer_s"
  else
    echo none
  fi
}

# Say one thing and note the answer; true if it was taken.
say() {
  answer=$(ask "$1" 2>/dev/null)
  if [ "$answer" = 000 ]; then : >"$folder/push.away"; else rm -f "$folder/push.away"; fi
  [ "$answer" = 204 ]
}

# Whether it may help to say the same again: the platform may not know the job yet, be busy, or be away.
worthwhile() {
  case $answer in
    404 | 408 | 429 | 5?? | 000 | '') return 0 ;;
    *) return 1 ;;
  esac
}

# The last line that the program wrote.
progress() {
  if [ -s "$folder/progress" ]; then tail -n 1 "$folder/progress" 2>/dev/null | head -c "$text_bytes"; fi
}

# Wait, and hear a signal at once.
pause() {
  sleep "$1" &
  wait $!
}

watch() {
  local launcher=$1 said='' now tries=0 quiet_s=0
  trap 'say event=stopping </dev/null; exit 0' TERM
  until say event=start </dev/null; do
    tries=$((tries + 1))
    worthwhile && [ "$tries" -lt "$start_tries" ] && kill -0 "$launcher" 2>/dev/null || exit 0
    if [ "$answer" = 404 ] && [ "$tries" -lt "$early_tries" ]; then pause "$early_s"; else pause "$look_s"; fi
  done
  while pause "$look_s"; kill -0 "$launcher" 2>/dev/null; do
    quiet_s=$((quiet_s + look_s))
    now=$(progress)
    if [ "$now" != "$said" ]; then
      say event=progress <<<"$now" && said=$now quiet_s=0 && echo "$now" >"$folder/push.said"
    elif [ "$quiet_s" -ge "$heartbeat_s" ]; then
      say event=heartbeat </dev/null && quiet_s=0
    else
      continue
    fi
    [ "$answer" = 204 ] || worthwhile || exit 0
  done
  # Whoever ended the launcher did not let it say how the program ended.
  say event=stopping </dev/null
}

end() {
  local give_up_at now
  if [ -e "$folder/push.away" ]; then end_s=0; fi
  give_up_at=$((SECONDS + end_s))
  if [ -s "$folder/push.pid" ]; then kill -KILL -- "-$(cat "$folder/push.pid")" 2>/dev/null; fi
  now=$(progress)
  if [ "$now" = "$(cat "$folder/push.said" 2>/dev/null)" ]; then now=""; fi
  until say "event=end&exit_code=$1" <<<"$now"; do
    worthwhile && [ "$SECONDS" -lt "$give_up_at" ] || return
    sleep "$soon_s"
  done
}

case $what in
  watch) watch "$more" ;;
  end) end "$more" ;;
esac
