// Prints its own stack in each case, `CASE;FUNCTION LINE;...` leaf first, and spins there.
"use strict";
let sink = 0;
let printing = null;
// Milliseconds that `spin` takes.
let time = 0;
Error.stackTraceLimit = 200;

function stack(name) {
  if (name !== printing) return;
  printing = null;
  const prepare = Error.prepareStackTrace;
  Error.prepareStackTrace = (_, frames) => frames;
  const frames = new Error().stack;
  Error.prepareStackTrace = prepare;
  const own = frames.slice(1).filter((frame) => frame.getFileName() === __filename);
  console.log([name, ...own.map((frame) => `${frame.getFunctionName() ?? "(anonymous)"} ${frame.getLineNumber()}`)].join(";"));
}

function spin(name) {
  stack(name);
  const end = performance.now() + time;
  do burn(); while (performance.now() < end);
}

function burn() {
  let sum = 0;
  for (let i = 0; i < 5000; i++) sum = (sum + (i ^ (sum >>> 3))) | 0;
  sink = sum;
}

function plain() {
  // The call that counts is not in the line where its statement begins.
  Math.max(
    0,
    spin("plain"),
  );
}

function arrow() {
  const add = (n) => {
    spin("arrow");
    return n + 1;
  };
  sink = add(1);
}

function recursion(depth) {
  if (depth === 0) spin("recursion");
  else recursion(depth - 1);
}

class Shape {
  draw() {
    spin("method");
  }
}

class Square extends Shape {
  draw() {
    super.draw();
  }
}

const square = new Square();

function callback() {
  [1].forEach(function inner() {
    spin("callback");
  });
}

function sorted() {
  [2, 1].sort((a, b) => {
    spin("sorted");
    return a - b;
  });
}

function thrown() {
  try {
    throw new Error("x");
  } catch (error) {
    spin("thrown");
  }
}

class Made {
  constructor() {
    spin("made");
  }
}

function made() {
  new Made();
}

function* numbers() {
  spin("generator");
  yield 1;
}

function generator() {
  for (const n of numbers()) sink += n;
}

function replaced() {
  "a".replace(/a/, function replacer() {
    spin("replaced");
    return "b";
  });
}

function all(print) {
  printing = print;
  plain();
  arrow();
  recursion(40);
  square.draw();
  callback();
  sorted();
  thrown();
  made();
  generator();
  replaced();
}

// The stacks are printed when the code is compiled as far as it will be, and by the same line that runs later.
const names = ["plain", "arrow", "recursion", "method", "callback", "sorted", "thrown", "made", "generator", "replaced"];
const rounds = Number(process.argv[2]);

// With --allow-natives-syntax the program goes on until Maglev has compiled its own code, or fails to.
const native = process.execArgv.includes("--allow-natives-syntax");
const isMaglev = native ? new Function("f", "return %ActiveTierIsMaglev(f)") : () => true;
const isCompiled = () => [burn, spin, plain, recursion].every((f) => isMaglev(f));
let more = 100;

for (let i = -rounds; ; i++) {
  if (i === 0 && !isCompiled() && more-- > 0) i = -rounds;
  if (i === names.length + rounds) {
    if (native) console.log(`compilers;${isCompiled() ? "maglev" : "others"}`);
    console.log("ready");
    time = 20;
  }
  all(i >= 0 && i < names.length ? names[i] : null);
}
