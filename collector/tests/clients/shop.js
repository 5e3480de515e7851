// A program that sends profiles of itself with Pyroscope's client for Node: node shop.js URL.
const Pyroscope = require('@pyroscope/nodejs')

Pyroscope.init({
  serverAddress: process.argv[2],
  appName: 'shop.node',
  tags: { region: 'eu' },
  flushIntervalMs: 2000,
  wall: { collectCpuTime: true, samplingDurationMs: 2000 },
})
Pyroscope.start()

const end = Date.now() + 6000
const held = []
let total = 0
function hotNode() {
  for (let i = 0; i < 1e6; i++) total += Math.sqrt(i)
}
function turn() {
  for (let i = 0; i < 1000; i++) held.push({ i, text: String(i) })
  hotNode()
  if (Date.now() < end) setTimeout(turn, 1)
  else Pyroscope.stop().then(() => process.exit(0))
}
turn()
