-- One subject or several: a sorted set each, of the requests allowed within the subject's longest
-- window, scored by their time in microseconds.
-- KEYS: the set of each subject.
-- ARGV: 1 to count a request with every subject if all rates of all subjects allow it, 0 to count
-- nothing; then, for each subject, the number of its rates, and by rising window each rate's limit
-- and window.
-- Returns 1 if all rates allow a request, else 0; then, for each rate, how many requests are in the
-- window that ends now, and how long until the oldest of them leaves it. A request that was counted
-- is among them.
local take = ARGV[1] == '1'
local function at(time) return string.format('%.0f', time) end

local subjects, next_argument = {}, 2
while ARGV[next_argument] do
  local rates = {}
  for n = 1, tonumber(ARGV[next_argument]) do
    rates[n] = {
      limit = tonumber(ARGV[next_argument + 2 * n - 1]),
      window = tonumber(ARGV[next_argument + 2 * n]),
    }
  end
  next_argument = next_argument + 2 * #rates + 1
  local key, longest = KEYS[#subjects + 1], rates[#rates].window
  -- Redis's clock may be set back: then the time of the latest request counts as now. Requests that
  -- are more than a whole window ahead come from a clock that was far wrong, and no longer count:
  -- otherwise their user would be refused for as long as the clock was wrong.
  local horizon, present = at(now + longest), now
  local last = redis.call('ZREVRANGEBYSCORE', key, horizon, '-inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
  if last and tonumber(last) > present then present = tonumber(last) end
  subjects[#subjects + 1] =
    {key = key, rates = rates, longest = longest, horizon = horizon, now = present}
end

local function used(subject, window)
  local since = '(' .. at(subject.now - window)
  return redis.call('ZCOUNT', subject.key, since, at(subject.now))
end

local allowed = true
for _, subject in ipairs(subjects) do
  for _, rate in ipairs(subject.rates) do
    if used(subject, rate.window) >= rate.limit then allowed = false end
  end
end

if take and allowed then
  for _, subject in ipairs(subjects) do
    local key, longest, now = subject.key, subject.longest, subject.now
    redis.call('ZREMRANGEBYSCORE', key, '-inf', at(now - longest))
    redis.call('ZREMRANGEBYSCORE', key, '(' .. subject.horizon, '+inf')
    -- Several requests may have the same microsecond, and each must be a separate member.
    redis.call('ZADD', key, at(now), at(now) .. '-' .. redis.call('ZCOUNT', key, at(now), at(now)))
    redis.call('PEXPIRE', key, at(math.ceil(longest / 1000)))
  end
end

local reply = {allowed and 1 or 0}
for _, subject in ipairs(subjects) do
  for _, rate in ipairs(subject.rates) do
    local since = '(' .. at(subject.now - rate.window)
    local oldest = redis.call('ZRANGEBYSCORE', subject.key, since, at(subject.now), 'WITHSCORES', 'LIMIT', 0, 1)[2]
    reply[#reply + 1] = used(subject, rate.window)
    reply[#reply + 1] = oldest and tonumber(oldest) + rate.window - subject.now or rate.window
  end
end
return reply
