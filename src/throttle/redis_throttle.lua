-- One key: a sorted set of the requests allowed within the longest window, scored by their time in microseconds.
-- ARGV: 1 to count a request if all rates allow it, 0 only to look; then, by rising window, each rate's limit and window.
-- Answers 1 if all rates allow a request, else 0; then, for each rate, how many requests are in the window that ends now, and
-- how long until the oldest of them leaves it. A request that was counted is among them.
local key, take = KEYS[1], ARGV[1] == '1'
local longest = tonumber(ARGV[#ARGV])
local function at(time) return string.format('%.0f', time) end

-- Redis's clock may be set back: then the latest request says what time it is. Requests more than a whole window ahead are left
-- by a clock that was far off, and count no more: otherwise they would keep their user out for as long as it was off.
local horizon = at(now + longest)
local last = redis.call('ZREVRANGEBYSCORE', key, horizon, '-inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
if last and tonumber(last) > now then now = tonumber(last) end

local function used(window)
  return redis.call('ZCOUNT', key, '(' .. at(now - window), at(now))
end

local allowed = true
for i = 2, #ARGV, 2 do
  if used(tonumber(ARGV[i + 1])) >= tonumber(ARGV[i]) then allowed = false end
end

if take and allowed then
  redis.call('ZREMRANGEBYSCORE', key, '-inf', at(now - longest))
  redis.call('ZREMRANGEBYSCORE', key, '(' .. horizon, '+inf')
  -- Several requests may fall into one microsecond, and each is a member of its own.
  redis.call('ZADD', key, at(now), at(now) .. '-' .. redis.call('ZCOUNT', key, at(now), at(now)))
  redis.call('PEXPIRE', key, at(math.ceil(longest / 1000)))
end

local answer = {allowed and 1 or 0}
for i = 2, #ARGV, 2 do
  local window = tonumber(ARGV[i + 1])
  local oldest = redis.call('ZRANGEBYSCORE', key, '(' .. at(now - window), at(now), 'WITHSCORES', 'LIMIT', 0, 1)[2]
  answer[#answer + 1] = used(window)
  answer[#answer + 1] = oldest and tonumber(oldest) + window - now or window
end
return answer
