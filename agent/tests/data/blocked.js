// Blocks in several ways, with standard input among them. In its first round it prints its own stack in each, `CASE;FUNCTION LINE;...`
// leaf first, by the line that blocks.
"use strict";
const fs = require("fs");
let printing = true;
const word = new Int32Array(new SharedArrayBuffer(4));
const byte = Buffer.alloc(1);
Error.stackTraceLimit = 200;

function print(name) {
  if (!printing) return;
  const prepare = Error.prepareStackTrace;
  Error.prepareStackTrace = (_, frames) => frames;
  const frames = new Error().stack;
  Error.prepareStackTrace = prepare;
  const own = frames.slice(1).filter((frame) => frame.getFileName() === __filename);
  console.log([name, ...own.map((frame) => `${frame.getFunctionName() ?? "(anonymous)"} ${frame.getLineNumber()}`)].join(";"));
}

function wait() {
  print("wait"); Atomics.wait(word, 0, 0, 30);
}

function read() {
  print("read"); fs.readSync(0, byte, 0, 1);
}

class Service {
  handle(items) {
    return items.map((item) => {
      print("callback"); return Atomics.wait(word, 0, 0, 30);
    });
  }
}

function deep(depth) {
  if (depth > 0) {
    deep(depth - 1);
  } else {
    print("deep"); Atomics.wait(word, 0, 0, 30);
  }
}

// Their values lie on the stack, between the frames of the callee and the caller.
const padding = Array(450).fill(0);

function all() {
  wait();
  read.apply(null, padding);
  new Service().handle([1]);
  deep(30);
}

for (;;) {
  all();
  if (printing) console.log("ready");
  printing = false;
}
