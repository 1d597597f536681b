import t from 'tap';
import { softwareKernel } from '../lib/kernel/index.ts';
import type { ModelOptions } from '../lib/model_options.ts';
import { compareVersions, describe, type Outcome } from './conformance/scenario.ts';
import { counterexamples } from './differential/counterexamples.ts';
import { fuzz } from './differential/fuzz.ts';
import { factsOf, modelOf } from './differential/machine.ts';
import type { Step } from './differential/program.ts';
import { describeDifference, type Pair, runProgram } from './differential/run.ts';
import { Tally } from './differential/tally.ts';
import { realKernel } from './kvm_host.ts';
import { onSoftware } from './pace.ts';

// Programs of calls, kept ones and a few random ones, on the model and on the kernel it plays. `npm run fuzz` runs many.

const SEED = 20_260;

function twice(model: ModelOptions): Pair {
  return { model: () => softwareKernel(model), other: () => softwareKernel(model), facts: factsOf(model) };
}

if (onSoftware)
  t.test('the model answers the same program the same way twice', async (t) => {
    const models: ModelOptions[] = [{}, { arch: 'aarch64' }, { kernel: '6.18', swProtected: false, tdp: false }];
    for (const model of models) {
      const tally = new Tally();
      const difference = fuzz(twice(model), { runs: 60, seed: SEED, observer: tally });
      t.equal(difference && describeDifference(difference), null, JSON.stringify(model));
      t.ok(tally.calls > 1000, `${tally.calls} calls`);
    }
  });

t.test('programs that once told the model from a kernel', async (t) => {
  for (const { found, answer, model, program } of counterexamples) {
    const answers: string[] = [];
    const observer = { step: (_step: Step, outcome: Outcome) => answers.push(describe(outcome)), excluded: () => {} };
    const difference = runProgram(twice(model ?? {}), program, observer);
    t.equal(difference && describeDifference(difference), null, found);
    t.equal(answers[program.length - 1], answer, found);
  }
  const kernel = realKernel();
  // Older kernels suffer from requests that excluded.ts names, and are left alone until a big run has survived on them.
  if ('reason' in kernel || compareVersions(kernel.release, '7.2') < 0) return;
  const model = modelOf(kernel);
  const pair = { ...twice(model), other: () => kernel };
  for (const { found, program } of counterexamples) {
    const difference = runProgram(pair, program);
    t.equal(difference && describeDifference(difference), null, `${kernel.release}: ${found}`);
  }
});
