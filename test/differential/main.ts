import { parseArgs } from 'node:util';
import { softwareKernel } from '../../lib/kernel/index.ts';
import { realKernel } from '../kvm_host.ts';
import { machines } from '../machines/machines.ts';
import { runInMachine } from '../machines/run.ts';
import { fuzz } from './fuzz.ts';
import { callNames } from './generate.ts';
import { factsOf, modelOf } from './machine.ts';
import type { Call } from './program.ts';
import { RuleCounter } from './rules.ts';
import { describeDifference, type Pair } from './run.ts';
import { ruleLines, Tally } from './tally.ts';

// `npm run fuzz`: random programs on the running kernel and on the model that plays it. Status 1 when they disagree.

/** Programs between two looks at the event loop, where what was closed is let go. */
const BATCH = 50;
/** Batches that may end with a difference: the rest of such a batch is not run. */
const DIFFERENCES = 12;
/** Calls that a kernel other than a machine's own gets: if it falls over, the host does. */
const HOST_CALLS = 50_000;
/** How often a rule is to be the deciding one in a big run. */
const BAR = 100;

const usage = `npm run fuzz -- [--runs N] [--seed S] [--calls a,b,…] [--length N] [--minutes N] [--machine M] [--software]
  --runs      programs, ${BATCH} by default; this host's kernel gets ${HOST_CALLS} calls and no more
  --seed      of the first ${BATCH} programs; the next ${BATCH} have the next seed
  --calls     only these: ${callNames.join(', ')}
  --length    steps of a program at most, behind its setup
  --minutes   no new programs after so many
  --machine   in this emulated machine instead of here: ${machines.map(({ name }) => name).join(', ')}
  --software  the model with itself, where there is no KVM`;

function read() {
  const { values } = parseArgs({
    options: {
      runs: { type: 'string', default: String(BATCH) },
      seed: { type: 'string', default: String(Date.now() % 1_000_000) },
      calls: { type: 'string' },
      length: { type: 'string', default: '60' },
      minutes: { type: 'string', default: '1000' },
      software: { type: 'boolean', default: false },
      machine: { type: 'string' },
      help: { type: 'boolean', default: false },
    },
  });
  const calls = values.calls?.split(',') as Call[] | undefined;
  const unknown = calls?.filter((call) => !callNames.includes(call)) ?? [];
  const [runs, seed, length, minutes] = [values.runs, values.seed, values.length, values.minutes].map(Number) as [
    number,
    number,
    number,
    number,
  ];
  if (values.help || unknown.length > 0 || ![runs, seed, length, minutes].every(Number.isSafeInteger)) {
    console.log(unknown.length > 0 ? `unknown calls: ${unknown.join(', ')}\n${usage}` : usage);
    process.exit(values.help ? 0 : 2);
  }
  const machine = machines.find(({ name }) => name === values.machine);
  if (values.machine && !machine) {
    console.log(`there are the machines ${machines.map(({ name }) => name).join(', ')}, not ${values.machine}`);
    process.exit(2);
  }
  return { machine, runs, seed, length, minutes, calls, software: values.software };
}

const { machine, runs, seed, length, minutes, calls, software } = read();
if (machine) {
  const args = process.argv.slice(2).filter((argument, index, all) => {
    return !argument.startsWith('--machine') && all[index - 1] !== '--machine';
  });
  const { status, problem } = await runInMachine(machine, ['dist/test/differential/main.js', ...args], { deadline: 0 });
  if (problem) console.error(`fuzz: ${problem}`);
  process.exit(status ?? 1);
}
const kernel = software ? softwareKernel() : realKernel();
if ('reason' in kernel) {
  console.error(`fuzz: no real kernel here: ${kernel.reason}\nfuzz: --software compares the model with itself`);
  process.exit(2);
}
const model = modelOf(kernel);
const counter = new RuleCounter();
const tally = new Tally();
const pair: Pair = {
  model: () => softwareKernel(model),
  other: software ? () => softwareKernel(model) : () => kernel,
  facts: factsOf(model),
  inModel: counter.within,
};
console.log(`${kernel.name} ${kernel.release}, played by the model ${JSON.stringify(model)}`);

const began = Date.now();
let done = 0;
const differences: string[] = [];
const isTime = (): boolean => Date.now() - began > minutes * 60_000;
const limit = software || process.env.MACHINE ? Infinity : HOST_CALLS;
for (let batch = 0; done < runs && tally.calls < limit && differences.length < DIFFERENCES && !isTime(); batch++) {
  const count = Math.min(BATCH, runs - done);
  const difference = fuzz(pair, { runs: count, seed: seed + batch, calls, length, observer: tally });
  done += count;
  if (difference) {
    const text = describeDifference(difference);
    if (!differences.includes(text)) console.log(`\nthey disagree (--seed ${seed + batch} --runs ${count}): ${text}\n`);
    differences.push(text);
  }
  if (batch % 10 === 9 || done >= runs) {
    const seconds = ((Date.now() - began) / 1000).toFixed(0);
    console.error(`${done} of ${runs} programs, ${tally.calls} calls, ${seconds} s, seed ${seed + batch}`);
  }
  await new Promise(setImmediate);
}
if (done < runs && tally.calls >= limit)
  console.log(`stopped at ${limit} calls: a kernel that a host needs gets no more; --machine takes any number`);
console.log([`${done} programs, ${tally.calls} calls`, ...tally.lines()].join('\n'));
console.log(['which rule decided:', ...ruleLines(counter, model, BAR)].join('\n'));
process.exitCode = differences.length > 0 ? 1 : 0;
