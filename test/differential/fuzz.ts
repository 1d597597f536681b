import * as fc from 'fast-check';
import { programOf, programs } from './generate.ts';
import type { Call } from './program.ts';
import { type Difference, type Observer, type Pair, runProgram } from './run.ts';

export interface FuzzOptions {
  readonly runs: number;
  readonly seed: number;
  readonly calls?: readonly Call[] | undefined;
  readonly observer?: Observer;
  /** Whether to look for the smallest program; true unless told. */
  readonly shrink?: boolean;
  /** Steps of a program at most, behind its setup. */
  readonly length?: number;
}

/** Random programs until two kernels disagree; then the smallest program they disagree on. */
export function fuzz(
  pair: Pair,
  { runs, seed, calls, observer, shrink = true, length = 60 }: FuzzOptions,
): Difference | null {
  let shrinking = false;
  const { inModel: _, ...quiet } = pair;
  const property = fc.property(programs({ length, calls }), (parts) => {
    // Only what was chosen at random counts, not what a counterexample shrinks through.
    const agree = runProgram(shrinking ? quiet : pair, programOf(parts), shrinking ? undefined : observer) === null;
    shrinking ||= !agree;
    return agree;
  });
  const { counterexample } = fc.check(property, { numRuns: runs, seed, endOnFailure: !shrink });
  return counterexample ? runProgram(pair, programOf(counterexample[0])) : null;
}
