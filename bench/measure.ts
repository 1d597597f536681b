// How things are timed: side by side in one process, round by round, so that what else the machine does hits both.

/** One line of the result. */
export interface Row {
  readonly name: string;
  readonly value: number;
  readonly unit: string;
  /** What the value must not pass; the direction is in `atLeast`. Without a bar it is only told. */
  readonly bar?: number;
  /** The bar is a floor instead of a ceiling. */
  readonly atLeast?: boolean;
  /** The times behind a ratio. */
  readonly detail?: string;
}

/** Why a section, or a part of one, was not measured. */
export interface Skipped {
  readonly name: string;
  readonly skipped: string;
}

export type Result = Row | Skipped;

export function meetsBar({ value, bar, atLeast = false }: Row): boolean | undefined {
  if (bar === undefined) return undefined;
  return atLeast ? value >= bar : value <= bar;
}

/** The value that this part of them does not exceed. */
export function quantile(values: readonly number[], part: number): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(part * (sorted.length - 1))] as number;
}

/** Nanoseconds per call of a loop that makes `calls` of them, after a quarter as many that do not count. */
export function timed(loop: (calls: number) => void, calls: number): number {
  loop((calls >> 2) + 1);
  const start = process.hrtime.bigint();
  loop(calls);
  return Number(process.hrtime.bigint() - start) / calls;
}

/** A thing to be timed: nanoseconds per call, over one round. */
export type Round = () => number | Promise<number>;

/**
 * Many short rounds in turn. What else the machine does only ever adds time, and to a call that waits for the scheduler a
 * multiple of its own, so the time is the one that a quarter of the rounds stayed below. They take turns in who begins:
 * whoever comes after another process finds the caches cold.
 *
 * @returns nanoseconds of each, and how many times the first one's that is
 */
export async function sideBySide(
  contestants: readonly Round[],
  rounds: number,
): Promise<{ time: number; ratio: number }[]> {
  for (const run of contestants) await run();
  const times: number[][] = contestants.map(() => []);
  for (let round = 0; round < rounds; round++) {
    for (let turn = 0; turn < contestants.length; turn++) {
      const index = (round + turn) % contestants.length;
      times[index]?.push((await contestants[index]?.()) as number);
    }
  }
  const reference = quantile(times[0] as number[], 0.25);
  return times.map((own) => {
    const time = quantile(own, 0.25);
    return { time, ratio: time / reference };
  });
}

export function nanoseconds(time: number): string {
  return time < 10_000 ? `${time.toFixed(0)} ns` : `${(time / 1000).toFixed(1)} µs`;
}
