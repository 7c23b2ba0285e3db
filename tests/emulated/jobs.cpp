/* jobs.cpp - the order of jobs, as the kernels for Hopper find it from a number: every job of every head, once. */
#include "hopper.h"

#include "../../cuda/softmax_wgmma_jobs.cuh"
#include "jobs.h"

#include <vector>

/* Jobs of ROWS rows that do not come exactly once, of `lines` heads with these items of work. */
template <int ROWS, bool KEY_ROWS, bool IN_ORDER> static int count_wrong(const usp_softmax &args, int items) {
    constexpr int parts = USP_WORK_ROWS / ROWS;
    job_deals deals;
    job_list<ROWS, KEY_ROWS, IN_ORDER> list(args, deals);
    int lines = (int)lines_of(args, KEY_ROWS), jobs = items * parts * lines, wrong = 0;
    std::vector<int> seen((size_t)jobs);
    for (int n = 0; n < jobs; n++) {
        softmax_job job = list.job_of((uint32_t)n);
        int item = (int)(job.work - tiles_of(args, KEY_ROWS).work) * parts + (job.begin - job.work->begin) / ROWS;
        seen[(size_t)((job.batch * (int)heads_of(args, KEY_ROWS) + job.head) * items * parts + item)]++;
        wrong += job.count != ROWS;
    }
    for (int times : seen) wrong += times != 1;
    return wrong + (list.job_of((uint32_t)jobs).count != 0);
}

extern "C" int usp_emulated_jobs(int batch, int heads, int items, int even, int64_t columns) {
    std::vector<usp_work> work((size_t)items);
    usp_tile_count count = {};
    usp_softmax args = {};
    for (int i = 0; i < items; i++) work[(size_t)i].begin = i * USP_WORK_ROWS, work[(size_t)i].count = USP_WORK_ROWS;
    count.works = items, count.even = even;
    args.batch = batch, args.heads = args.key_heads = heads, args.queries = args.keys = columns, args.first = 1;
    args.by_query.work = args.by_key.work = work.data(), args.by_query.count = args.by_key.count = &count;
    gridDim = {132, 1, 1};
    return count_wrong<128, false, false>(args, items) + count_wrong<128, true, false>(args, items) +
           count_wrong<64, true, false>(args, items) + count_wrong<128, true, true>(args, items);
}
