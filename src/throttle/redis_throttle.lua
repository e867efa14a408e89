-- One key: a sorted set of the requests allowed within the longest window, scored by their time in
-- microseconds.
-- ARGV: 1 to count a request if all rates allow it, 0 to count nothing; then, by rising window, each
-- rate's limit and window.
-- Returns 1 if all rates allow a request, else 0; then, for each rate, how many requests are in the
-- window that ends now, and how long until the oldest of them leaves it. A request that was counted
-- is among them.
local key, take = KEYS[1], ARGV[1] == '1'
local longest = tonumber(ARGV[#ARGV])
local function at(time) return string.format('%.0f', time) end

-- Redis's clock may be set back: then the time of the latest request counts as now. Requests that are
-- more than a whole window ahead come from a clock that was far wrong, and no longer count: otherwise
-- their user would be refused for as long as the clock was wrong.
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
  -- Several requests may have the same microsecond, and each must be a separate member.
  redis.call('ZADD', key, at(now), at(now) .. '-' .. redis.call('ZCOUNT', key, at(now), at(now)))
  redis.call('PEXPIRE', key, at(math.ceil(longest / 1000)))
end

local reply = {allowed and 1 or 0}
for i = 2, #ARGV, 2 do
  local window = tonumber(ARGV[i + 1])
  local oldest = redis.call('ZRANGEBYSCORE', key, '(' .. at(now - window), at(now), 'WITHSCORES', 'LIMIT', 0, 1)[2]
  reply[#reply + 1] = used(window)
  reply[#reply + 1] = oldest and tonumber(oldest) + window - now or window
end
return reply
