local function inner(count)
  local sum = 0
  for i = 1, count do sum = (sum + i * 7) % 1000003 end
  return sum
end
print("ready")
io.flush()
while true do inner(1000000) end
