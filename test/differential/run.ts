import type { Kernel } from '../../lib/kernel/kernel.ts';
import { describe, type Outcome } from '../conformance/scenario.ts';
import { epilogue } from './epilogue.ts';
import { excluded } from './excluded.ts';
import { Mirror } from './mirror.ts';
import { type Facts, literal, type Program, type Step } from './program.ts';
import { sameOutcome, World } from './world.ts';

/** Two kernels that must answer alike. */
export interface Pair {
  /** A model in its first state. */
  readonly model: () => Kernel;
  /** What it is compared with. */
  readonly other: () => Kernel;
  readonly facts: Facts;
  /** Puts its argument's calls between what has to be done around calls of the one kernel and of the other. */
  readonly inModel?: <T>(call: () => T) => T;
  readonly inOther?: <T>(call: () => T) => T;
}

export interface Observer {
  step(step: Step, outcome: Outcome): void;
  excluded(reason: string): void;
}

export interface Difference {
  /** The step, or null when closing everything. */
  readonly step: Step | null;
  readonly model: Outcome;
  readonly other: Outcome;
  /** The steps up to and including that one, those of the epilogue too. */
  readonly program: Program;
}

const plainly = <T>(call: () => T): T => call();

/** Carries a program out on both, with a look at what is visible at the end; null when they agreed on everything. */
export function runProgram(pair: Pair, program: Program, observer?: Observer): Difference | null {
  const { inModel = plainly, inOther = plainly } = pair;
  const model = inModel(() => new World(pair.model(), pair.facts));
  const other = inOther(() => new World(pair.other(), pair.facts));
  const mirror = new Mirror(model, pair.facts);
  const done: Step[] = [];

  const perform = (step: Step): Difference | null => {
    const reason = excluded(step, mirror, other.kernel);
    if (reason) {
      observer?.excluded(reason);
      return null;
    }
    done.push(step);
    mirror.before(step);
    const size = mirror.sizeFor(step);
    const expected = inModel(() => attempt(() => model.perform(step, size)));
    const got = inOther(() => attempt(() => other.perform(step, size)));
    if (!sameOutcome(expected, got)) return { step, model: expected, other: got, program: done };
    mirror.note(step, got);
    observer?.step(step, got);
    return null;
  };

  const performAll = (steps: Iterable<Step>): Difference | null => {
    for (const step of steps) {
      const difference = perform(step);
      if (difference) return difference;
    }
    return null;
  };
  const difference = performAll(program) ?? performAll(epilogue(mirror));
  const [expected, got] = [inModel(() => attempt(() => model.close())), inOther(() => attempt(() => other.close()))];
  if (!difference && !sameOutcome(expected, got)) return { step: null, model: expected, other: got, program: done };
  return difference;
}

/** What a kernel throws is a difference too, not the end of the run. */
function attempt(call: () => Outcome): Outcome {
  try {
    return call();
  } catch (error) {
    return `threw ${error instanceof Error ? error.message : error}`;
  }
}

export function describeDifference({ step, model, other, program }: Difference): string {
  return [
    `${step ? step.call : 'closing everything'}: the model says ${describe(model)}, the kernel ${describe(other)}`,
    literal(program),
  ].join('\n');
}
