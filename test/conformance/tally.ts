import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

/** How the cases went on one kernel, by their numbers. */
export interface Tally {
  readonly kernel: string;
  readonly agree: string[];
  readonly disagree: string[];
  /** By what was missing. */
  readonly notApplicable: Record<string, string[]>;
}

/** The tallies of one family of kernels, or the reason why there are none. */
export interface Published {
  readonly tallies: readonly Tally[];
  readonly reason?: string | undefined;
}

/** Where test runs leave what they found out. In a machine of test/machines it is a folder of its own. */
export const resultsFolder = fileURLToPath(new URL('../../../.tap/', import.meta.url));

const fileOf = (family: string, folder: string) => join(folder, 'conformance', `${family}.json`);

export function publish(family: string, published: Published): void {
  mkdirSync(join(resultsFolder, 'conformance'), { recursive: true });
  writeFileSync(fileOf(family, resultsFolder), JSON.stringify(published));
}

/** What the last run left; undefined where there was none. */
export function published(family: string, folder: string = resultsFolder): Published | undefined {
  const file = fileOf(family, folder);
  return existsSync(file) ? (JSON.parse(readFileSync(file, 'utf8')) as Published) : undefined;
}

/** A line for a kernel. */
export function summary({ kernel, agree, disagree, notApplicable }: Tally): string {
  const reasons = group(notApplicable);
  const left = reasons.reduce((sum, [, count]) => sum + count, 0);
  const disagreeing = disagree.length > 0 ? `, ${disagree.length} DISAGREE` : '';
  const why = left > 0 ? ` (${reasons.map(([why, count]) => `${why}: ${count}`).join('; ')})` : '';
  return `${kernel}: ${agree.length} cases agree${disagreeing}, ${left} not applicable${why}`;
}

/** The most frequent reason first; what belongs to other versions is one reason. */
function group(notApplicable: Readonly<Record<string, readonly string[]>>): [string, number][] {
  const groups = new Map<string, number>();
  for (const [missing, cases] of Object.entries(notApplicable)) {
    const reason = missing.replace(/^(not )?older than .*/, 'other versions');
    groups.set(reason, (groups.get(reason) ?? 0) + cases.length);
  }
  return [...groups].sort(([, a], [, b]) => b - a);
}
