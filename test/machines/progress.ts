/** '4 min 12 s' */
export function duration(milliseconds: number): string {
  const seconds = Math.round(milliseconds / 1000);
  return seconds < 60 ? `${seconds} s` : `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
}

/** Shows how far something is, each time it is called: on a terminal in one line, elsewhere a line for each tenth. */
export function progress(what: string, total: number): () => void {
  let [done, shown] = [0, -1];
  return () => {
    const percent = Math.min(99, Math.floor((100 * ++done) / total));
    const step = process.stdout.isTTY ? percent : Math.floor(percent / 10) * 10;
    if (step === shown) return;
    shown = step;
    process.stdout.write(process.stdout.isTTY ? `\r${what}: ${step} %  ` : `${what}: ${step} %\n`);
  };
}
